"""Tokenizers with a few added tokens: exact on the ids that all models have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from published import run_to_the_end, write_project, write_published
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mergeopd.errors import RecipeError
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.events import Event, UpdateDone

THINK = ("<tool_response>", "</tool_response>", "<think>", "</think>")
PAD = "[PAD]"


class Updates:
    def __init__(self) -> None:
        self.done: list[UpdateDone] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, UpdateDone):
            self.done.append(event)


def dataset_recipe(folder: Path, student: str, teacher: str, response: str) -> Path:
    """One update on ready answers, whose divergence can be computed by hand."""
    phase = {"name": "p", "text": "dataset", "updates": 1, "prompts_per_round": 2, "loss": "reverse_kl"}
    recipe = write_project(folder, student, teacher, {"phases": [phase]})
    rows = [{"prompt": p, "answer": "a", "response": response} for p in ("ab", "c")]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return recipe


def divergence(folder: Path, num_ids: int) -> float:
    """Mean reverse KL of the two models, both renormalised over the first `num_ids` ids, by transformers."""
    inputs = preflight(folder / "job.yaml")
    models = {
        name: AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64).eval()
        for name in ("student", "teacher")
    }
    found = []
    for prompt in inputs.prompts["p"]:
        assert isinstance(prompt.response, str)
        response = [*inputs.student.tokenizer.encode(prompt.response), inputs.student.end_id]
        own = []
        for name, dialect in (("student", inputs.student), ("teacher", inputs.teachers["t"])):
            ids = [*dialect.render(prompt), *response]
            with torch.no_grad():
                logits = models[name](torch.tensor([ids])).logits[0, -len(response) - 1 : -1, :num_ids]
            own.append(logits.log_softmax(-1))
        found.append((own[0].exp() * (own[0] - own[1])).sum(-1))
    return float(torch.cat(found).mean())


@pytest.mark.parametrize(
    ("student", "teacher", "teachers_own", "students_own"),
    [("qwen2.5", "qwen3", THINK, ()), ("qwen3-base", "qwen2.5", (), THINK), ("mistral", "mistral", (), ())],
)
def test_the_divergence_is_that_over_the_ids_of_both(
    tmp_path: Path, student: str, teacher: str, teachers_own: tuple[str, ...], students_own: tuple[str, ...]
) -> None:
    if student == "mistral":  # a fine-tune with a pad token, for which its head has a row
        write_published(tmp_path / "teacher", "mistral", beyond=[PAD], rows=256 + 5 + 1)
        teachers_own = (PAD,)
    recipe = dataset_recipe(tmp_path, student, teacher, "yes")
    inputs = preflight(recipe)
    num_shared = inputs.student.tokenizer.num_shared(inputs.teachers["t"].tokenizer)
    assert inputs.vocab_size == num_shared
    before = load_file(tmp_path / "student" / "model.safetensors")["model.embed_tokens.weight"]
    updates = Updates()
    folder = run_to_the_end(recipe, reporter=updates)
    [update] = updates.done
    assert num_shared is not None
    assert update.teachers["t"].divergence["reverse_kl"] == pytest.approx(
        divergence(tmp_path, num_shared), rel=2e-4
    )
    # Tokens of the student alone are left as they were: AdamW moves every row that has a gradient.
    after = load_file(folder.export / "model.safetensors")["model.embed_tokens.weight"]
    moved = (before != after).any(1)
    assert moved[:num_shared].any()
    assert not moved[num_shared:].any()
    notes = "\n".join(inputs.notes)
    for only, said in (
        (teachers_own, "that the student does not have"),
        (students_own, "that teacher 't' does not have"),
    ):
        assert (said in notes) == bool(only)
        assert not only or repr(only[0]) in notes


def test_a_text_with_a_token_of_the_student_alone_is_refused(tmp_path: Path) -> None:
    recipe = dataset_recipe(tmp_path, "qwen3", "qwen2.5", "<think>yes")
    with pytest.raises(
        RecipeError, match=r"2 of 2 dataset responses have tokens that .*p\.jsonl:1: '<think>'"
    ):
        preflight(recipe)


def test_an_id_without_a_row_is_refused_where_a_text_needs_it(tmp_path: Path) -> None:
    """Gemma 3's text models: `<image_soft_token>` is 262144, and the head has 262144 rows."""
    for name in ("student", "teacher"):
        write_published(tmp_path / name, "gemma-3", beyond=["<image_soft_token>"])
    recipe = write_project(tmp_path, "gemma-3", "gemma-3")
    inputs = preflight(recipe)
    assert inputs.vocab_size == inputs.student.vocab_size == inputs.student.tokenizer.vocab_size - 1
    assert inputs.notes == ()
    run_to_the_end(recipe)
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a <image_soft_token>", "answer": "a"}))
    with pytest.raises(RecipeError, match=r"p\.jsonl:1: has the token '<image_soft_token>', for which the"):
        preflight(recipe)


def test_end_tokens_must_be_shared(tmp_path: Path) -> None:
    """A chat model on a base without its tokens (Hermes on Mistral) ends with an id that the base lacks."""
    write_published(tmp_path / "teacher", "mistral", beyond=["<|im_end|>"], rows=256 + 5 + 1)
    config = json.loads((tmp_path / "teacher" / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"].replace("eos_token", "'<|im_end|>'")
    (tmp_path / "teacher" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"one of them ends responses: '<\|im_end\|>'; .*bridge: pieces"):
        preflight(write_project(tmp_path, "mistral", "mistral"))


def test_shifted_or_many_ids_need_a_bridge(tmp_path: Path) -> None:
    own = Tokenizer.load(write_published(tmp_path / "own", "qwen2.5"))
    many = write_published(tmp_path / "many", "qwen2.5", beyond=[f"<extra_{i}>" for i in range(65)])
    assert own.num_shared(Tokenizer.load(many)) is None
    few = Tokenizer.load(write_published(tmp_path / "few", "qwen2.5", beyond=["<a>", "<b>"]))
    assert own.num_shared(few) == few.num_shared(own) == own.vocab_size
    assert few.num_shared(
        Tokenizer.load(write_published(tmp_path / "x", "qwen2.5", beyond=["<a>", "<c>"]))
    ) == (own.vocab_size + 1)
    state = json.loads((tmp_path / "own" / "tokenizer.json").read_text())
    a, b = sorted(state["model"]["vocab"])[:2]
    vocab = state["model"]["vocab"]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (tmp_path / "many" / "tokenizer.json").write_text(json.dumps(state))
    assert own.num_shared(Tokenizer.load(tmp_path / "many")) is None
