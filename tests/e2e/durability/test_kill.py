"""kill -9 anywhere: the same command goes on, and the end is that of an undisturbed run, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

# Which call of which place (tools/fault.py): after how many updates it comes, and what is saved then.
POINTS = {
    "replace:1": (0, None),  # plan.yaml is half there
    "text:2": (0, None),  # some of a teacher's texts are there
    "rollout:70": (5, 4),  # between two tokens of an answer
    "scoring:40": (2, 2),
    "gradient:5": (2, 2),  # some of an update's micro-batches are done
    "update:6": (5, 4),  # the gradient is there, the weights are not
    "step:4": (3, 2),  # the weights are there, nothing tells of it; the second update of its round
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
    assert (len(metrics.read_text().splitlines()) if metrics.exists() else 0) == num_done
    steps = [int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")]
    assert max(steps, default=None) == saved
    printed = ends_well(name)
    assert (f"goes on after update {saved}" in printed) == (saved is not None)
    # Nothing that was not finished is left.
    assert [path for path in folder.rglob("*") if path.name.endswith(".partial")] == []
