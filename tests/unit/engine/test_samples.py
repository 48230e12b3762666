"""Sampled responses: which, when, and that their figures are those of the models."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.build import build
from mergeopd.engine.clock import Clock
from mergeopd.engine.interrupt import Interrupt
from mergeopd.engine.models import Machine, load_models
from mergeopd.engine.samples import PER_DOMAIN, choose, is_due, token_texts
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.events import Candidates, Event, RolloutSampled, UpdateDone
from mergeopd.storage.run_folder import RunFolder
from mergeopd.types import Prompt, Rollout

CPU = torch.device("cpu")
V = 5


class Stop(BaseException):
    """The machine goes down."""


class Recorder:
    """Keeps the samples; goes down at update `stop_at`, before its samples are told."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.samples: list[RolloutSampled] = []
        self._stop_at = stop_at

    def emit(self, event: Event) -> None:
        if isinstance(event, RolloutSampled):
            self.samples.append(event)
        elif isinstance(event, UpdateDone) and event.update == self._stop_at:
            raise Stop


def samples_of(recipe: Path, *overrides: str, stop_at: int | None = None) -> list[RolloutSampled]:
    inputs = preflight(recipe, overrides)
    folder, recorder = RunFolder(Path(inputs.plan.output)), Recorder(stop_at)
    folder.claim(inputs.plan, inputs.files, inputs.now, ())
    parts = load_models(inputs, Machine(CPU, SingleProcess()))
    progress = parts.checkpoints().restore(folder.plan_hashes(), recorder).progress
    with contextlib.suppress(Stop):
        build(parts, reporter=recorder, clock=Clock(), interrupt=Interrupt()).run(progress, None)
    return recorder.samples


def logprobs(folder: Path, ids: list[int], answer: int, tau: float) -> torch.Tensor:
    """Full-vocabulary log-probabilities of the last `answer` positions, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -answer - 1 : -1, :V]
    return torch.log_softmax(logits / tau, -1)


def test_the_numbers_are_those_of_student_and_teachers(write_job: Callable[..., Path]) -> None:
    words = {"a": 0, "b": 1, "c": 2, "d": 3, "<eos>": 4}
    loss = {"reverse_kl": 1.0, "forward_kl": 0.5, "temperature": 1.5}
    recipe = write_job({"phases": [{"name": "merge", "updates": 2, "loss": loss, "prompts_per_round": 4}]})
    first = [sample for sample in samples_of(recipe) if sample.update == 1]
    assert [sample.domain for sample in first] == ["left", "left", "right", "right"]
    assert len({sample.key for sample in first}) == 4
    for sample in first:
        answer = [words[token.strip()] for token in sample.tokens]
        prompt = [words[word] for word in sample.prompt.split()]
        student = logprobs(recipe.parent / "base", prompt + answer, len(answer), 1.5)
        rows = torch.arange(len(answer))
        assert sample.logprob_S == pytest.approx(student[rows, answer].tolist(), rel=1e-4)
        assert sample.divergence == "reverse_kl"
        assert sorted(sample.teachers) == (["one", "two"] if sample.domain == "left" else ["two"])
        for name, trace in sample.teachers.items():
            seen = [0, 1, 2, 3, 0, 1, 2, *prompt] if name == "one" else prompt
            teacher = logprobs(recipe.parent / name, seen + answer, len(answer), 1.5)
            reverse_kl = (student.exp() * (student - teacher)).sum(-1)
            assert trace.divergence == pytest.approx(reverse_kl.tolist(), rel=1e-3, abs=1e-5)
            assert trace.logprob_T == pytest.approx(teacher[rows, answer].tolist(), rel=1e-4)
            assert not trace.masked
            assert_top(trace.candidates, teacher)
        assert_top(sample.candidates, student)


def assert_top(candidates: Candidates | None, expected: torch.Tensor) -> None:
    """The three most probable tokens of every position, best first."""
    assert candidates is not None
    names = ["a", "b", "c", "d", "<eos>"]
    best, ids = expected.topk(3)
    for row, values, tokens in zip(candidates, best.tolist(), ids.tolist(), strict=True):
        assert row is not None
        assert [text.strip() for text, _ in row] == [names[token] for token in tokens]
        assert [value for _, value in row] == pytest.approx(values, rel=1e-4)


def test_a_resumed_run_samples_the_same(write_job: Callable[..., Path]) -> None:
    phase = {"name": "merge", "updates": 4, "loss": "reverse_kl", "prompts_per_round": 4}
    recipe = write_job({"phases": [phase], "checkpoint": {"every": 2}})
    whole = samples_of(recipe, "output=straight")
    before = samples_of(recipe, "output=broken", stop_at=4)
    assert {sample.update for sample in before} == {1, 2, 3}
    after = samples_of(recipe, "output=broken")
    assert {sample.update for sample in after} == {3, 4}
    assert [s for s in before if s.update < 3] + after == whole


def test_without_divergences_there_are_no_teachers(write_job: Callable[..., Path]) -> None:
    phase = {"name": "imitate", "text": "teacher", "updates": 1, "loss": "nll", "prompts_per_round": 4}
    samples = samples_of(write_job({"phases": [phase]}))
    assert {(sample.divergence, len(sample.teachers)) for sample in samples} == {("", 0)}
    assert {sample.origin for sample in samples} == {"teacher"}
    assert all(len(sample.logprob_S) == len(sample.tokens) > 0 for sample in samples)


@pytest.mark.parametrize(("total", "times"), [(1, 1), (3, 3), (20, 20), (39, 39), (180, 21), (1000, 21)])
def test_a_run_is_sampled_about_every_twentieth(total: int, times: int) -> None:
    due = [update for update in range(1, total + 1) if is_due(update, total)]
    assert (due[0], due[-1]) == (1, total)
    assert len(due) == times


def rollout(key: str, domain: str, ids: tuple[int, ...] = (1, 2)) -> Rollout:
    return Rollout(Prompt(key, "s", domain, ()), 0, (0,), ids, "student", "eos")


def test_the_first_responses_to_different_prompts_are_chosen() -> None:
    rollouts = [
        rollout("a", "x"), rollout("a", "x"), rollout("b", "x", ()), rollout("c", "y"), rollout("d", "x"),
        rollout("e", "x"), rollout("f", "y"),
    ]  # fmt: skip
    assert PER_DOMAIN == 2
    assert choose(rollouts, range(7)) == (0, 3, 4, 6)
    assert choose(rollouts, (1, 5, 6)) == (1, 5, 6)


# --------------------------------------------------------------------------------------------- texts


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Every byte a token, as in byte-level BPE before any merge."""
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return Tokenizer.load(folder)


@given(text=st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_token_texts_concatenate_to_the_response(bytes_tokenizer: Tokenizer, text: str) -> None:
    ids = [*bytes_tokenizer.encode(text), bytes_tokenizer.eos_id]
    texts = token_texts(ids, bytes_tokenizer)
    assert len(texts) == len(ids)
    assert "".join(texts) == bytes_tokenizer.decode(ids, skip_special_tokens=False)
    assert texts[-1].endswith("<end>")


def test_a_character_of_several_tokens_is_at_its_last_token(bytes_tokenizer: Tokenizer) -> None:
    ids = bytes_tokenizer.encode("aé€b")
    assert token_texts(ids, bytes_tokenizer) == ("a", "", "é", "", "", "€", "b")
    assert token_texts(ids[:5], bytes_tokenizer) == ("a", "", "é", "", "\N{REPLACEMENT CHARACTER}")


def test_spaces_between_words_belong_to_the_later_one(write_job: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.load(write_job().parent / "base")
    assert token_texts([0, 1, 3] * 6 + [4], tokenizer) == ("a", *([" b", " d", " a"] * 6)[:17], " <eos>")


def test_no_tokens_have_no_texts(bytes_tokenizer: Tokenizer) -> None:
    assert token_texts([], bytes_tokenizer) == ()
