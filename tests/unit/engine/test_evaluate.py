"""The evaluation: which models are measured on what, what is kept, and what is generated again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.build import build_evaluation
from mergeopd.engine.clock import Clock
from mergeopd.engine.models import Machine
from mergeopd.engine.stages import Stages
from mergeopd.errors import RecipeError
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.comparison import Measured, build_result
from mergeopd.reporting.events import EvaluationDone, Event, Note
from mergeopd.rollout import local
from mergeopd.storage.responses import read_responses

CPU = torch.device("cpu")
SOURCES = [
    {"source": "eval_left.jsonl", "domain": "left", "verifier": "exact", "expert": "one"},
    {"source": "eval_right.jsonl", "domain": "right", "verifier": "exact", "expert": "two"},
]


class Events:
    def __init__(self) -> None:
        self.done: list[EvaluationDone] = []
        self.notes: list[str] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, EvaluationDone):
            self.done.append(event)
        elif isinstance(event, Note):
            self.notes.append(event.text)


@pytest.fixture
def job(
    write_job: Callable[..., Path], make_model: Callable[..., Path], tmp_path: Path
) -> Callable[..., Path]:
    """Writes a recipe with the given evaluation settings; experts have the base's shape."""

    def write(**evaluation: Any) -> Path:
        path = write_job({"evaluation": {"prompts": SOURCES, "max_new_tokens": 3, **evaluation}})
        for seed, name in enumerate(("one", "two"), start=2):
            made = make_model(name, seed=seed, vocab=6, model_type="stablelm", eos=4)
            shutil.copytree(made, tmp_path / name, dirs_exist_ok=True)
        rows = [f'{{"prompt": "{text}", "answer": "c"}}' for text in ("a a", "b b", "c c", "d d")]
        (tmp_path / "eval_left.jsonl").write_text("\n".join(rows[:3]))
        (tmp_path / "eval_right.jsonl").write_text("\n".join(rows))
        return path

    return write


def evaluate(
    recipe: Path, responses: Path | None = None, only: Sequence[str] = (), merged: str | None = "two"
) -> tuple[Measured, Events]:
    inputs, events = preflight(recipe), Events()
    assert inputs.plan.evaluation is not None
    stages = Stages(events, Clock(), SingleProcess(), None)
    evaluation = build_evaluation(inputs, inputs.plan.evaluation, Machine(CPU, SingleProcess()), stages)
    return evaluation.run(merged and recipe.parent / merged, responses, only), events


def test_every_model_on_every_domain(job: Callable[..., Path]) -> None:
    merges = ["weight_average", "slerp", {"kind": "ties", "density": 0.5}]
    measured, events = evaluate(job(static_merges=merges))
    keys = ["base", "expert/one", "expert/two", "merge/weight_average", "merge/slerp", "merge/ties", "merged"]
    assert [model.key for model in measured.models] == keys
    assert {key: {d: len(v) for d, v in row.items()} for key, row in measured.scores.items()} == {
        key: {"left": 3, "right": 4} for key in keys
    }
    assert measured.experts == {"left": "expert/one", "right": "expert/two"}
    own = [(e.model.key, e.suite) for e in events.done if e.is_own_expert]
    assert own == [("expert/one", "left"), ("expert/two", "right")]
    # The merged student is a copy of `two`, with the student's template, which is also that of `two`.
    for domain in ("left", "right"):
        assert np.array_equal(measured.scores["merged"][domain], measured.scores["expert/two"][domain])


def test_only_own_domains(job: Callable[..., Path]) -> None:
    measured, _ = evaluate(job(all_experts=False, static_merges=[]))
    assert list(measured.scores) == ["base", "expert/one", "expert/two", "merged"]
    assert list(measured.scores["expert/one"]) == ["left"]


def test_responses_are_kept_with_their_verdicts(job: Callable[..., Path], tmp_path: Path) -> None:
    measured, _ = evaluate(job(), tmp_path / "evaluation")
    names = {path.stem for path in (tmp_path / "evaluation").iterdir()}
    assert names == {model.key.replace("/", "-") for model in measured.models}
    rows = read_responses(tmp_path / "evaluation" / "merged.parquet")
    assert [(row.domain, row.prompt) for row in rows[:3]] == [
        ("left", "a a"),
        ("left", "b b"),
        ("left", "c c"),
    ]
    for domain, values in measured.scores["merged"].items():
        assert [row.reward for row in rows if row.domain == domain] == values.tolist()
    assert all(row.reward == float(row.response.strip() == "c") for row in rows)


def test_a_model_generates_once(job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A second evaluation opens nothing; other settings, other weights and other prompts do."""
    generated: list[int] = []
    original = local.generate

    def generate(generator: Any, requests: Any, *args: Any, **named: Any) -> Any:
        generated.append(len(requests))
        return original(generator, requests, *args, **named)

    monkeypatch.setattr(local, "generate", generate)
    recipe = job()
    first, _ = evaluate(recipe)
    # Base, two experts, the average; the merged student has the weights of `two`, but a file of its own.
    assert generated == [3, 4] * 5
    generated.clear()
    second, _ = evaluate(recipe)
    assert generated == []
    assert {k: {d: v.tolist() for d, v in row.items()} for k, row in first.scores.items()} == {
        k: {d: v.tolist() for d, v in row.items()} for k, row in second.scores.items()
    }
    with (recipe.parent / "eval_left.jsonl").open("a") as file:
        file.write('\n{"prompt": "a d", "answer": "c"}')
    evaluate(recipe)
    assert generated == [1] * 5
    generated.clear()
    config = recipe.parent / "two" / "config.json"  # of expert and student, and a part of the average's key
    config.write_text(config.read_text().replace('"silu"', '"gelu"'))
    evaluate(recipe)
    assert generated == [4, 4] * 3


def test_several_samples_are_means_per_prompt(job: Callable[..., Path], tmp_path: Path) -> None:
    measured, _ = evaluate(job(samples=4, temperature=1.0), tmp_path / "evaluation")
    rows = read_responses(tmp_path / "evaluation" / "base.parquet")
    left = [row for row in rows if row.domain == "left"]
    assert [(row.key[-1], row.sample) for row in left] == [(str(p), s) for p in range(3) for s in range(4)]
    assert len({row.response for row in left}) > 1
    expected = [np.mean([row.reward for row in left[i : i + 4]]) for i in (0, 4, 8)]
    assert measured.scores["base"]["left"].tolist() == expected


def test_an_expert_with_a_short_context_is_left_out(job: Callable[..., Path]) -> None:
    recipe = job()
    with (recipe.parent / "eval_right.jsonl").open("a") as file:
        file.write(
            f'\n{{"prompt": "{"a " * 119}a", "answer": "c"}}'
        )  # `one` has a template of seven tokens more
    measured, events = evaluate(recipe)
    assert "right" not in measured.scores["expert/one"]
    assert events.notes == ["one is not measured on right: its context of 128 tokens is too short"]


def test_prompts_that_are_trained_on(job: Callable[..., Path]) -> None:
    recipe = job()
    (recipe.parent / "eval_left.jsonl").write_text(
        '{"prompt": "a b", "answer": "c"}\n{"prompt": "d", "answer": "c"}'
    )
    with pytest.raises(RecipeError, match="1 of 2 prompts are also trained on"):
        preflight(recipe)
    inputs = preflight(recipe, ["evaluation.prompts.0.allow_overlap=true"])
    assert sorted(inputs.overlap.values()) == [0, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 2}, "2 greedy responses to a prompt are equal"),
        ({"static_merges": ["ties", "ties"]}, "'ties' is listed twice"),
        ({"static_merges": ["tie"]}, "ties"),
    ],
)
def test_settings_that_contradict(job: Callable[..., Path], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        preflight(job(**settings))


def test_several_suites_of_a_domain_and_one_that_no_prompt_trains(
    job: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = job(
        prompts=[
            *SOURCES,
            {"source": "facts.jsonl", "domain": "facts", "verifier": "exact", "expert": "none"},
            {"source": "more.jsonl", "domain": "left", "name": "more", "verifier": "exact"}
            | {"samples": 4, "temperature": 1.0, "max_new_tokens": 2},
        ]
    )
    for name in ("facts", "more"):
        shutil.copy(tmp_path / "eval_right.jsonl", tmp_path / f"{name}.jsonl")
    measured, events = evaluate(recipe, tmp_path / "evaluation")
    suites = {"left": "left", "right": "right", "facts": "facts", "more": "left"}
    assert measured.domains == suites
    assert measured.experts == {
        "left": "expert/one",
        "right": "expert/two",
        "facts": None,
        "more": "expert/one",
    }
    assert all(list(row) == list(suites) for row in measured.scores.values())
    own = [(e.model.key, e.suite) for e in events.done if e.is_own_expert]
    assert own == [("expert/one", "left"), ("expert/one", "more"), ("expert/two", "right")]
    # The same greedy prompts under another name; other settings in the last suite alone.
    assert np.array_equal(measured.scores["merged"]["facts"], measured.scores["merged"]["right"])
    rows = read_responses(tmp_path / "evaluation" / "merged.parquet")
    counts = {suite: [row for row in rows if row.suite == suite] for suite in suites}
    assert {suite: len(of) for suite, of in counts.items()} == {"left": 3, "right": 4, "facts": 4, "more": 16}
    assert max(row.num_tokens for row in counts["more"]) == 2
    result = build_result(measured, {})
    correct = np.array([row.reward for row in counts["more"]]).reshape(4, 4)
    pairs = [correct[:, [i, j]].max(1).mean() for i in range(4) for j in range(i)]
    passes = result.suites["more"].pass_at_k["merged"]
    assert [passes[2].value, passes[4].value] == pytest.approx([np.mean(pairs), correct.max(1).mean()])
    assert set(result.suites["more"].pass_at_k) == set(measured.scores)
    assert (result.suites["left"].pass_at_k, result.suites["more"].samples) == ({}, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domain": "rigth", "expert": None}, "did you mean 'right'"),
        ({"name": "left"}, "suite 'left' is of domain 'left' at evaluation.prompts\\[0\\]"),
        (
            {"domain": "left", "samples": 2, "temperature": 1.0, "expert": "one"},
            "`samples: 1` at .*, and 2 here",
        ),
        ({"samples": 2}, "2 greedy responses to a prompt are equal"),
        ({"domain": "left", "expert": "none"}, "domain 'left' is compared with 'one' at"),
    ],
)
def test_suites_that_contradict(job: Callable[..., Path], change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        preflight(job(prompts=[SOURCES[0], {**SOURCES[1], **change}]))


def test_only_named_models_are_opened(job: Callable[..., Path], tmp_path: Path) -> None:
    recipe = job()
    alone, events = evaluate(recipe, tmp_path / "first", only=["merged"])
    assert [model.key for model in alone.models] == ["merged"]
    assert [path.stem for path in (tmp_path / "first").iterdir()] == ["merged"]
    assert events.notes == [
        "base, one, two and weight average are not measured: "
        "`--only` leaves out models whose responses are not kept"
    ]
    base, _ = evaluate(recipe, only=["base"], merged=None)
    assert list(base.scores) == ["base"]
    # Both are kept now, so the next one has them, and opens a third.
    third, events = evaluate(recipe, only=["expert/two"])
    assert list(third.scores) == ["base", "expert/two", "merged"]
    assert events.notes[0].startswith("base and merged were not loaded: all their responses are kept in ")
    assert np.array_equal(third.scores["merged"]["right"], alone.scores["merged"]["right"])
    whole, events = evaluate(recipe)
    assert len(whole.scores) == 5
    _, events = evaluate(recipe)
    assert events.notes[0].startswith("base, one, two, weight average and merged were not loaded")


def test_only_skills_that_no_prompt_trains(job: Callable[..., Path], tmp_path: Path) -> None:
    """Without an expert to compare with, all teachers are measured."""
    recipe = job(prompts=[{**SOURCES[1], "domain": "facts", "expert": "none"}])
    measured, events = evaluate(recipe)
    assert [model.title for model in measured.models] == ["base", "one", "two", "weight average", "merged"]
    assert not any(event.is_own_expert for event in events.done)
    result = build_result(measured, {})
    assert result.verdict.startswith(("keeps facts (", "gains facts: ", "forgets facts: "))
    assert set(result.mean) == {"base", "static_merge", "merged"}
    assert result.mean_recovered.value is None
