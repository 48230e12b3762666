"""Reward models as verifiers: scores as transformers computes them, runs, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizers import byte_level
from safetensors.torch import load_file, save_file

from mergeopd.engine.rollouts import submission
from mergeopd.engine.run import run_recipe
from mergeopd.errors import RecipeError, UpdateLimitReached
from mergeopd.preflight.inputs import Inputs, preflight
from mergeopd.reward.grading import Submission
from mergeopd.reward.pool import Grade
from mergeopd.teacher import reward_model as reward_model_module
from mergeopd.teacher.reward_model import RewardModel, RewardModels
from mergeopd.types import Episode, Message, Prompt, Rollout, token_ids

# Conversations end with the padding token, as those of Qwen may.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}<end>{% endfor %}"
)
OUTCOME = {"rollout": {"max_new_tokens": 6, "samples_per_prompt": 4}, "checkpoint": {"every": 1}}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 reward model with a byte tokenizer, whose scores differ by several units."""
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    folder = tmp_path_factory.mktemp("reward")
    tokenizer = byte_level()
    torch.manual_seed(5)
    config = Qwen3Config(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.3,
        num_labels=1,
        eos_token_id=tokenizer.token_to_id("<end>"),
        pad_token_id=tokenizer.token_to_id("<end>"),
    )
    Qwen3ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.fixture
def recipe(
    write_job: Callable[..., Path], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A job whose sources have the reward model `reward`, with two scales."""
    monkeypatch.chdir(tmp_path)
    Path("reward").mkdir()
    for file in weights.iterdir():
        Path("reward", file.name).write_bytes(file.read_bytes())
    Path("reward.yaml").write_text(json.dumps({"card": 1, "name": "judge", "model": "reward"}))
    verifier = {"kind": "reward_model", "card": "reward.yaml", "max_tokens": 100}
    sources = [
        {"source": "left.jsonl", "domain": "left", "teachers": {"one": 1.0}, "verifier": verifier},
        {"source": "right.jsonl", "domain": "right", "teachers": {"two": 0.7}, "verifier": verifier},
    ]
    sources[1]["verifier"] = {**verifier, "scale": 2.5}
    Path("eval.jsonl").write_text('{"prompt": "d d d"}\n{"prompt": "c b"}\n')
    loss = {"reverse_kl": 1.0, "outcome": 1.0}
    return write_job(
        {
            **OUTCOME,
            "prompts": sources,
            "phases": [{"name": "merge", "updates": 2, "loss": loss, "prompts_per_round": 4}],
            "evaluation": {
                "prompts": [{"source": "eval.jsonl", "domain": "left", "verifier": verifier}],
                "static_merges": [],
                "max_new_tokens": 5,
            },
        }
    )


def models_of(inputs: Inputs) -> RewardModels:
    models = {
        source.name: RewardModel(Path("reward"), inputs.reward_models[source.name], source.verifier)  # type: ignore[arg-type]
        for source in inputs.plan.sources
    }
    return RewardModels(models, torch.device("cpu"))


def asked(source: str, prompt: str, response: str) -> Submission:
    messages = (Message("user", prompt), Message("assistant", response))
    return Submission(source, response, None, messages=messages)


def transformers_score(one: Submission) -> float:
    """The logit of a conversation alone, in transformers' own tokenizer, template and model."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("reward")
    model = AutoModelForSequenceClassification.from_pretrained("reward")
    messages = [{"role": m.role, "content": m.content} for m in one.messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    with torch.no_grad():
        logits: torch.Tensor = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits
    return logits.item()


def test_rewards_are_those_of_transformers_whatever_the_batch(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = models_of(preflight(recipe))
    responses = ("b", "hello he", "a b c d", "", "cc 1 1 1 well", "b" * 20)
    submissions = [asked(source, "a?", text) for text in responses for source in ("left", "right")]
    scale = {"left": 1.0, "right": 2.5}
    want = [1 / (1 + math.exp(-transformers_score(one) / scale[one.source])) for one in submissions]
    loaded: list[Path] = []
    load = reward_model_module._load

    def counted(folder: Path, *rest: Any) -> Any:
        loaded.append(folder)
        return load(folder, *rest)

    monkeypatch.setattr(reward_model_module, "_load", counted)
    progress: list[int] = []
    rewards = [grade.reward for grade in models.grade(submissions, progress.append)]
    assert rewards == pytest.approx(want, abs=1e-5)
    assert max(want) - min(want) > 0.2
    assert loaded == [Path("reward")], "one model of two sources is loaded once"
    assert progress == sorted(progress)
    assert progress[-1] == len(submissions)
    alone = [models.grade([one], lambda _: None)[0].reward for one in submissions]
    assert alone == pytest.approx(rewards, abs=1e-5)


def test_what_the_model_cannot_read_costs_its_response_the_reward(recipe: Path) -> None:
    models = models_of(preflight(recipe))
    system = (Message("system", "s"), Message("user", "a"), Message("assistant", "b"))
    submissions = [
        asked("left", "a", "b"),
        asked("left", "a", "b" * 100),
        Submission("left", "b", None, messages=system),
    ]
    good, long, refused = models.grade(submissions, lambda _: None)
    assert good.reward is not None
    assert long == Grade(None, "the conversation has 120 tokens, the reward model's context 64")
    assert refused.reward is None
    assert "no system role" in str(refused.failure)
    tensors = load_file("reward/model.safetensors")
    tensors["score.weight"][0, 0] = float("nan")
    save_file(tensors, "reward/model.safetensors", {"format": "pt"})
    assert models.grade([submissions[0]], lambda _: None) == [
        Grade(None, "the score of the reward model is nan")
    ]


def test_all_turns_of_a_response_are_read(recipe: Path) -> None:
    tokenizer = preflight(recipe).student.tokenizer
    tools = ({"name": "f"},)
    prompt = Prompt("left:0", "left", "left", (Message("user", "a"),), tools=tools)
    turns = (Message("assistant", "b"), Message("tool", "c"), Message("assistant", "d"))
    ids = token_ids([3, 4])  # "d", and the end token
    for is_truncated, given in ((False, turns), (True, turns[:2])):
        episode = Episode(given, ids, num_turns=2, num_calls=1, num_failed_calls=0)
        rollout = Rollout(prompt, 0, token_ids([0]), ids, "student", "eos", episode=episode)
        one = submission(rollout, "length" if is_truncated else "eos", tokenizer, ())
        assert one.messages == (*prompt.messages, *turns)
        assert (one.response, one.truncated, one.tools) == ("d", is_truncated, tools)


def metrics(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_from_the_rewards_and_resumes(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Submission] = []
    grade = RewardModels.grade

    def recorded(self: RewardModels, submissions: Any, on_progress: Any) -> list[Grade]:
        seen.extend(submissions)
        return grade(self, submissions, on_progress)

    monkeypatch.setattr(RewardModels, "grade", recorded)
    run_recipe(recipe, ("output=whole",), None, ())
    first = [one for one in seen if one.source in ("left", "right")][:16]
    rewards = models_of(preflight(recipe)).grade(first, lambda _: None)
    mean = sum(one.reward or 0.0 for one in rewards) / 16
    domains = metrics("whole")[0]["domains"]
    assert sum(domain["reward"] for domain in domains.values()) / 2 == pytest.approx(mean, abs=1e-5)
    assert all(line["verifier_failures"] == {} for line in metrics("whole"))
    measured = [one for one in seen if one.source == "eval"]
    assert len(measured) == 3 * 2, "two responses of base, expert and merged student"
    rewards = models_of(preflight(recipe)).grade(
        [replace(one, source="left") for one in measured[-2:]], lambda _: None
    )
    result = json.loads(Path("whole/result.json").read_text())["suites"]["left"]["accuracy"]["merged"]
    assert result["value"] == pytest.approx(sum(one.reward or 0.0 for one in rewards) / 2, abs=1e-5)
    with pytest.raises(UpdateLimitReached):
        run_recipe(recipe, (), 1, ())
    run_recipe(recipe, (), None, ())
    whole, resumed = (load_file(f"{run}/export/model.safetensors") for run in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    other = json.loads(Path("reward/config.json").read_text()) | {"pad_token_id": 0}
    Path("reward/config.json").write_text(json.dumps(other))
    with pytest.raises(Exception, match=r"reward/config\.json"):
        run_recipe(recipe, ("phases.0.updates=2",), None, ())


def change_config(**values: object) -> Callable[[], None]:
    def change() -> None:
        config = json.loads(Path("reward/config.json").read_text())
        Path("reward/config.json").write_text(json.dumps(config | values))

    return change


def card(**values: object) -> Callable[[], object]:
    text = json.dumps({"card": 1, "name": "judge", "model": "reward", **values})
    return lambda: Path("reward.yaml").write_text(text)


def without_template() -> None:
    names = json.loads(Path("reward/tokenizer_config.json").read_text())
    del names["chat_template"]
    Path("reward/tokenizer_config.json").write_text(json.dumps(names))


def deaf_template() -> None:
    Path("deaf.jinja").write_text("{{ messages[0].content }}")
    card(template="deaf.jinja")()


CASES: dict[str, tuple[Callable[[], object], tuple[str, ...], str]] = {
    "generative": (
        card(model="two"),
        (),
        "reward.yaml:1:39  prompts[0].verifier.card.model\n    two/config.json: not a reward model: the "
        "architecture is StableLmForCausalLM; name the folder of a sequence classifier",
    ),
    "labels": (change_config(id2label={"0": "bad", "1": "good"}), (), "it has 2 labels (id2label)"),
    "canary": (
        card(canary={"prompt": "a", "response": "b", "logprobs": [-1.0]}),
        (),
        "reward models generate none; remove it",
    ),
    "fingerprint": (card(fingerprint="0" * 64), (), "the weights in reward are not those of the card"),
    "no template": (without_template, (), "or name one in the card (`template: FILE.jinja`)"),
    "response left out": (deaf_template, (), "deaf.jinja: leaves the response out"),
    "system role": (
        lambda: Path("left.jsonl").write_text(
            json.dumps({"prompt": [{"role": r, "content": "a"} for r in ("system", "user")]})
        ),
        (),
        "1 of 1 prompt cannot be rendered for reward model 'judge': left.jsonl:1: reward/tokenizer_config.json,"
        " chat_template: cannot render a conversation (system, user): no system role",
    ),
    "context": (
        lambda: None,
        ("rollout.max_new_tokens=60",),
        "2 of 2 prompts are too long for reward model 'judge': first left.jsonl:1 takes 10 tokens",
    ),
    "model for card": (
        lambda: None,
        ("prompts.0.verifier.card=reward",),
        "'reward' is a model folder, not a reward model card; write its card, such as teachers/reward.yaml",
    ),
    "combined": (
        lambda: None,
        (
            "prompts.0.verifier={kind: combined, of: [exact, {verifier: {kind: reward_model, card: reward.yaml}}]}",
        ),
        "a reward model cannot be part of a combination",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_told_with_their_places(recipe: Path, case: str) -> None:
    change, overrides, text = CASES[case]
    change()
    with pytest.raises(RecipeError) as caught:
        preflight(recipe, overrides)
    assert text in "\n".join(map(str, caught.value.problems))
