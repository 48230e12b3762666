"""Accuracy during training, and the best student: the same weights, every measurement once, nothing lost."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mergeopd import api
from mergeopd.errors import RecipeError, Stopped
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.events import AccuracyMeasured, Event, RunFinished, StageStarted, UpdateDone
from mergeopd.storage.responses import read_responses

SOURCES = [
    {"source": "eval_left.jsonl", "domain": "left", "verifier": "exact", "expert": "one"},
    {"source": "eval_right.jsonl", "domain": "right", "verifier": "exact"},
    {"source": "facts.jsonl", "domain": "facts", "verifier": "exact", "expert": "none"},
]
WORDS = "abcd"
BEST = "checkpoint.best=left"


class Crash(BaseException):
    """Replaces a kill."""


@pytest.fixture(scope="module")
def recipe(write_job_in: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interim")
    phases = [
        {"name": "one", "updates": 5, "loss": "reverse_kl", "prompts_per_round": 4},
        {"name": "two", "updates": 4, "updates_per_round": 2, "loss": "reverse_kl", "prompts_per_round": 4},
    ]
    path = write_job_in(
        folder,
        {
            "phases": phases,
            "optimizer": {"lr": 0.02},
            "checkpoint": {"every": 3, "keep": 2},
            "rollout": {"max_new_tokens": 4},
            "evaluation": {
                "prompts": SOURCES,
                "max_new_tokens": 1,
                "static_merges": [],
                "all_experts": False,
                "interim": {"every": 2, "prompts": 9},
            },
        },
    )
    for number, name in enumerate(("eval_left", "eval_right", "facts")):
        texts = [f"{a} {b} {c} a" for a in WORDS for b in WORDS for c in WORDS][number::3]
        rows = [{"prompt": text, "answer": WORDS[number]} for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def straight(recipe: Path) -> Path:
    """A whole run that keeps its best student and all checkpoints."""
    return run(recipe, BEST, "checkpoint.every=1", "checkpoint.keep=9", "output=straight")


def run(recipe: Path, *changes: str, on_event: Callable[[Event], None] | None = None) -> Path:
    return api.run(recipe, set=changes, on_event=on_event).folder


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "accuracy.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def is_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "cost"} for row in rows]


def test_measuring_changes_no_weight_and_agrees_with_the_evaluation(recipe: Path) -> None:
    measured, plain = run(recipe, "output=with"), run(recipe, "output=without", "evaluation.interim=null")
    assert is_equal(weights(measured / "export"), weights(plain / "export"))
    assert metrics(measured) == metrics(plain)
    assert not (plain / "accuracy.jsonl").exists()
    curve = lines(measured)
    # Rounds of one update up to 5, then of two.
    assert [line["update"] for line in curve] == [0, 2, 4, 7, 9]
    # Both ends are a part of what the evaluation measures: nine evenly spaced prompts.
    for line, model in ((curve[0], "base"), (curve[-1], "merged")):
        rows = read_responses(measured / "evaluation" / f"{model}.parquet")
        for suite, estimate in line["accuracy"].items():
            rewards = [row.reward for row in rows if row.suite == suite]
            chosen = [rewards[int(i * len(rewards) / 9)] for i in range(9)]
            assert estimate["value"] == np.mean(chosen)
            assert line["num_prompts"][suite] == 9
    assert curve[0]["accuracy"] != curve[-1]["accuracy"]
    first, *_ = (json.loads(line)["cost"]["seconds"] for line in (measured / "metrics.jsonl").open())
    assert first["interim"] > 0


@pytest.mark.parametrize(
    ("kind", "update"), [(UpdateDone, 3), (AccuracyMeasured, 4), (StageStarted, 2), (RunFinished, 9)]
)
def test_a_killed_run_has_the_same_curve_and_exports_the_same(
    recipe: Path, straight: Path, kind: type[Event], update: int
) -> None:
    """Killed after an update, after a measurement, before the best is written, and after the evaluation."""
    output = f"output=killed-{kind.__name__}"
    seen = [0]

    def crash(event: Event) -> None:
        seen[0] = event.update if isinstance(event, UpdateDone) else seen[0]
        if isinstance(event, kind) and seen[0] == update and getattr(event, "stage", "export") == "export":
            raise Crash

    with pytest.raises(Crash):
        run(recipe, BEST, output, on_event=crash)
    if kind is RunFinished:
        (recipe.parent / "killed-RunFinished" / "result.json").unlink()
    killed = run(recipe, BEST, output)
    assert lines(killed) == lines(straight)
    assert is_equal(weights(killed / "export"), weights(straight / "export"))
    assert best_update(killed) == best_update(straight)


def best_update(folder: Path) -> int | None:
    result = api.load_run(folder).result
    assert result is not None
    return result.update


@pytest.mark.parametrize("metric", ["left", "accuracy"])
def test_the_best_student_is_exported(recipe: Path, straight: Path, metric: str) -> None:
    folder = straight if metric == "left" else run(recipe, f"checkpoint.best={metric}", "output=mean")
    values = {}
    for line in lines(folder)[1:]:
        accuracy = {suite: estimate["value"] for suite, estimate in line["accuracy"].items()}
        values[line["update"]] = accuracy.get(metric, sum(accuracy.values()) / 3)
    best = max(values, key=lambda update: (values[update], update))
    assert (best == 9) == (metric == "accuracy")
    assert best_update(folder) == best
    assert [path.name for path in (folder / "best").iterdir()] == [f"step-{best}"]
    state = load_file(straight / "checkpoints" / f"step-{best}" / "student-1-of-1.safetensors")
    exported = weights(folder / "export")
    assert all(torch.equal(exported[name], state[f"master.{name}"]) for name in exported)


def test_a_stop_while_measuring_is_made_up_for(recipe: Path, straight: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage == "evaluation" and seen:
            os.kill(os.getpid(), signal.SIGTERM)
            seen.clear()
        if isinstance(event, UpdateDone) and event.update == 4:
            seen.append(4)

    seen: list[int] = []
    with pytest.raises(Stopped, match="after 4 of 9 updates, all saved"):
        run(recipe, "output=stopped", on_event=stop)
    stopped = run(recipe, "output=stopped")
    assert lines(stopped) == lines(straight)
    assert metrics(stopped) == metrics(straight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["checkpoint.best=facts", "evaluation.interim=null"], "no accuracy is measured during training"),
        (["checkpoint.best=fact"], "no suite 'fact'; did you mean 'facts'"),
        (["checkpoint.best=accuracy", "evaluation=null"], "the recipe evaluates nothing"),
    ],
)
def test_a_best_student_needs_its_accuracy(recipe: Path, changes: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        preflight(recipe, changes)
