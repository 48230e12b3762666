"""Checkpoints: the student, its optimizer, weights that teachers follow, and where the run stands."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergeopd.engine.state import Progress
from mergeopd.errors import StorageError
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.values import Strict
from mergeopd.report.events import CheckpointSaved, CheckpointSkipped, Note, Reporter, StageStarted
from mergeopd.storage.failures import named_failures
from mergeopd.storage.folders import atomic_folder, newest_valid, prune, set_aside
from mergeopd.student.torch import TorchStudent
from mergeopd.teacher.past import Past

FORMAT = 1
_PAST = "past.safetensors"
_REMEDY = "move it away to go on from the one before, or choose another folder with --set output=..."


@dataclass(frozen=True, slots=True)
class Record:
    """Where a run stands, and the seconds it took to get there."""

    progress: Progress
    seconds: Mapping[str, float]


class _State(Strict):
    """state.json."""

    format: int
    plan: str
    progress: Progress
    seconds: dict[str, float]


def save(
    checkpoints: Path, student: TorchStudent, past: Past, record: Record, plan: Plan, reporter: Reporter
) -> None:
    """Write a checkpoint whole or not at all, then drop the oldest beyond `checkpoint.keep`.

    Raises StorageError when the disk refuses; earlier checkpoints are kept then.
    """
    reporter.emit(StageStarted("checkpoint"))
    target = checkpoints / f"step-{record.progress.update}"
    with atomic_folder(target) as folder:
        save_file(_contiguous(student.state()), folder / "student.safetensors")
        if past.followers:
            save_file(_contiguous(past.state()), folder / _PAST)
        state = _State(format=FORMAT, plan=plan.hash, progress=record.progress, seconds=dict(record.seconds))
        (folder / "state.json").write_text(state.model_dump_json(), encoding="utf-8")
    prune(checkpoints, plan.checkpoint.keep)
    reporter.emit(CheckpointSaved(record.progress.update, target))


def restore(
    checkpoints: Path, student: TorchStudent, past: Past, plan_hashes: Collection[str], reporter: Reporter
) -> Record:
    """Load the newest checkpoint that is whole; a fresh start when there is none.

    Damaged ones are told and set aside. `plan_hashes` are those that the run folder has had. Raises
    StorageError for a checkpoint that is whole but of another plan, model or format.
    """
    newest, skipped = newest_valid(checkpoints)
    for path, reason in skipped:
        set_aside(path)  # frees its number for the checkpoint that will be written in its place
        reporter.emit(CheckpointSkipped(path, reason))
    if newest is None:
        if skipped:
            reporter.emit(Note("no checkpoint is left that can be trusted: the run begins anew"))
        return Record(Progress(), {})
    state, tensors, earlier = _read(newest)
    if state.plan not in plan_hashes:
        raise StorageError(f"{newest} belongs to another recipe, or to other settings of this one; {_REMEDY}")
    _check_fit(newest, student.state(), tensors)
    student.load_state(tensors)
    try:
        past.load_state(earlier)
    except StorageError as error:
        raise StorageError(f"{newest}: {error}; {_REMEDY}") from error
    return Record(state.progress, state.seconds)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _read(folder: Path) -> tuple[_State, dict[str, Tensor], dict[str, Tensor]]:
    """State, student and past of a checkpoint whose manifest agrees, and which may still be anybody's."""
    with named_failures("read", folder):
        try:
            document = json.loads((folder / "state.json").read_bytes())
            version = document.get("format") if isinstance(document, dict) else None
            if version == FORMAT:
                state = _State.model_validate(document)
                earlier = load_file(folder / _PAST) if (folder / _PAST).is_file() else {}
                return state, load_file(folder / "student.safetensors"), earlier
        except ValidationError as error:
            faults = ", ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise StorageError(f"{folder}/state.json is not that of a run ({faults}); {_REMEDY}") from error
        except (ValueError, FileNotFoundError, SafetensorError) as error:
            raise StorageError(f"{folder} is not a checkpoint of a run ({error}); {_REMEDY}") from error
    raise StorageError(
        f"{folder} has format {version!r}, and this version of mergeopd reads {FORMAT}; {_REMEDY}"
    )


def _check_fit(folder: Path, own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise StorageError where the checkpoint's weights have other shapes than the student's."""
    for name, tensor in own.items():
        if name in found and found[name].shape != tensor.shape:
            raise StorageError(
                f"{folder} is of another student: {name.removeprefix('master.')} is "
                f"{list(found[name].shape)} there and {list(tensor.shape)} here; {_REMEDY}"
            )
