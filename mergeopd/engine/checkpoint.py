"""Checkpoints: the student, its optimizer and where the run stands."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from mergeopd.engine.state import Progress
from mergeopd.errors import StorageError
from mergeopd.recipe.plan import Plan
from mergeopd.report.events import CheckpointSaved, CheckpointSkipped, Reporter
from mergeopd.storage.folders import atomic_folder, newest_valid, prune, set_aside
from mergeopd.student.torch import TorchStudent

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Record:
    """Where a run stands, and the seconds it took to get there."""

    progress: Progress
    seconds: Mapping[str, float]


def save(checkpoints: Path, student: TorchStudent, record: Record, plan: Plan, reporter: Reporter) -> None:
    """Write a checkpoint whole or not at all, then drop the oldest beyond `checkpoint.keep`.

    Raises StorageError when the disk refuses; earlier checkpoints are kept then.
    """
    target = checkpoints / f"step-{record.progress.update}"
    with atomic_folder(target) as folder:
        tensors = {name: tensor.contiguous() for name, tensor in student.state().items()}
        save_file(tensors, folder / "student.safetensors")
        state = {"format": FORMAT, "plan": plan.hash, **asdict(record)}
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    prune(checkpoints, plan.checkpoint.keep)
    reporter.emit(CheckpointSaved(record.progress.update, target))


def restore(
    checkpoints: Path, student: TorchStudent, plan_hashes: Collection[str], reporter: Reporter
) -> Record:
    """Load the newest checkpoint that is whole; a fresh start when there is none.

    Damaged ones are told and set aside. `plan_hashes` are those that the run folder has had. Raises
    StorageError for a checkpoint of another plan.
    """
    newest, skipped = newest_valid(checkpoints)
    for path, reason in skipped:
        set_aside(path)  # frees its number for the checkpoint that will be written in its place
        reporter.emit(CheckpointSkipped(path, reason))
    if newest is None:
        return Record(Progress(), {})
    state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    if state["format"] != FORMAT or state["plan"] not in plan_hashes:
        raise StorageError(f"{newest} belongs to another plan; choose another folder with --set output=...")
    student.load_state(load_file(newest / "student.safetensors"))
    return Record(Progress(**state["progress"]), state["seconds"])
