"""kill -9 at many places: the same command resumes, and the outcome equals an undisturbed run bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Place and call (tools/fault.py): the number of updates made before, and the newest checkpoint. Checkpoints are
# written in the background: further updates may be made, and elsewhere the newest one may not be complete yet.
WRITING = {"files", "manifest", "rename", "renamed", "unlink"}
POINTS = {
    "replace:1": (0, None),  # plan.yaml is not yet renamed
    "text:2": (0, None),  # some teacher rollouts are cached
    "rollout:70": (5, 4),  # between two tokens of a response
    "scoring:40": (2, 2),
    "gradient:5": (2, 2),  # some of an update's micro-batches are done
    "update:6": (5, 4),  # the gradient is complete, the weights are not updated
    "step:4": (3, 2),  # the weights are updated, no metrics are written; the second update of its round
    "metrics:20": (5, 4),
    "files:2": (4, 2),  # the weights of a checkpoint without its state
    "manifest:2": (4, 2),
    "rename:2": (4, 2),
    "renamed:2": (4, 4),
    "rename:4": (6, 6),  # one checkpoint too many
    "unlink:6": (6, 6),  # the oldest checkpoint is half deleted
    "export:1": (6, 6),
    "evaluation:1": (6, 6),
}


@pytest.mark.parametrize("point", POINTS)
def test_kill(runs: Any, ends_well: Callable[..., str], point: str) -> None:
    name = "killed-" + point.replace(":", "-")
    code, printed = runs(name, fault=f"{point}:KILL")
    assert code == -9, printed
    num_done, saved = POINTS[point]
    folder = runs.folder(name)
    metrics = folder / "metrics.jsonl"
    num_lines = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    newest = max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")), default=None)
    if point.partition(":")[0] in WRITING:
        assert num_done <= num_lines
        assert newest == saved
    else:
        assert num_lines == num_done
        assert newest == saved or (newest or 0) + 2 == saved < 6
    printed = ends_well(name)
    assert (f"resumes after update {newest}" in printed) == (newest is not None)
    # No unfinished file is left.
    assert [path for path in folder.rglob("*") if path.name.endswith(".partial")] == []


# `lag` was copied again after update 4, `mean` moves after every round; only `two` teaches `right`.
FOLLOWING = (
    *("--set", "teachers.lag={student: {every: 3}}"),
    *("--set", "teachers.mean={student: {ema: 0.8}}"),
    *("--set", "prompts.0.teachers={one: 1.0, two: 0.5, lag: 0.3, mean: 0.2}"),
)


@pytest.fixture(scope="module")
def undisturbed_following(runs: Any, outcome: Callable[[Path], dict[str, str]]) -> dict[str, str]:
    """Outcome of a run without faults whose teachers follow the student."""
    code, printed = runs("following", *FOLLOWING)
    assert code == 0, printed
    return outcome(runs.folder("following"))


@pytest.mark.parametrize(
    ("fault", "saved"),
    [
        ("files:4:KILL", 2),  # the second checkpoint has these teachers' weights, but no state
        ("renamed:2:KILL", 4),
        ("update:6:KILL", 4),
        ("scoring:110:TERM", 5),  # within a round, after one that is not saved yet
    ],
)
def test_snapshots_of_the_student_are_restored(
    runs: Any,
    outcome: Callable[[Path], dict[str, str]],
    undisturbed_following: dict[str, str],
    fault: str,
    saved: int,
) -> None:
    name = "following-" + fault.replace(":", "-")
    code, printed = runs(name, *FOLLOWING, fault=fault)
    assert code == (-9 if fault.endswith("KILL") else 3), printed
    code, printed = runs(name, *FOLLOWING)
    assert code == 0, printed
    assert f"resumes after update {saved}" in printed or fault == "update:6:KILL"
    result = outcome(runs.folder(name))
    assert [key for key in undisturbed_following if result[key] != undisturbed_following[key]] == []
