"""Checkpoints: the student, its optimizer, its snapshots, and the progress of the run."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergeopd.config.values import Strict
from mergeopd.distributed.communicator import Communicator
from mergeopd.engine.progress import Progress
from mergeopd.errors import StorageError
from mergeopd.recipe.plan import Plan
from mergeopd.reporting.events import CheckpointSaved, CheckpointSkipped, Note, Reporter, StageStarted
from mergeopd.storage.failures import named_failures
from mergeopd.storage.folders import atomic_folder, newest_valid, prune, set_aside
from mergeopd.student.protocol import Stateful
from mergeopd.teacher.snapshots import StudentSnapshots

FORMAT = 1
_STUDENT, _PAST = "student", "past"
# Bytes per file, and the memory for tensors that come from other processes.
_MAX_FILE_BYTES = 5_000_000_000
_REMEDY = "move it away to resume from the previous one, or choose another folder with --set output=..."


@dataclass(frozen=True, slots=True)
class Record:
    """The progress of a run, and its seconds so far."""

    progress: Progress
    seconds: Mapping[str, float]


class _State(Strict):
    """state.json."""

    format: int
    plan: str
    progress: Progress
    seconds: dict[str, float]


@dataclass(frozen=True)
class Checkpoints:
    """The newest checkpoints of a run, in a folder."""

    folder: Path
    plan: Plan
    student: Stateful
    snapshots: StudentSnapshots
    ranks: Communicator

    def has(self, progress: Progress) -> bool:
        return self._path(progress).exists()

    def save(self, record: Record, reporter: Reporter) -> None:
        """Write a checkpoint atomically, then delete the oldest beyond `checkpoint.keep`. Collective.

        Raises StorageError when the disk fails; earlier checkpoints are kept then.
        """
        reporter.emit(StageStarted("checkpoint"))
        target = self._path(record.progress)
        with written_by_first(target, self.ranks) as folder:
            _write_tensors(self.student.state(), folder, _STUDENT)
            if self.ranks.is_first:
                _write_tensors(self.snapshots.state().items(), folder, _PAST)
                state = _State(
                    format=FORMAT,
                    plan=self.plan.hash,
                    progress=record.progress,
                    seconds=dict(record.seconds),
                )
                (folder / "state.json").write_text(state.model_dump_json(), encoding="utf-8")
        if self.ranks.is_first:
            prune(self.folder, self.plan.checkpoint.keep)
        reporter.emit(CheckpointSaved(record.progress.update, target))

    def restore(self, plan_hashes: Collection[str], reporter: Reporter) -> Record:
        """Load the newest intact checkpoint; start from the beginning when there is none. Collective.

        Damaged ones are reported and set aside. `plan_hashes` are the present and former ones of the run
        folder. Raises StorageError for an intact checkpoint of another plan, model or format.
        """
        newest, skipped = self.ranks.run_on_first(lambda: _newest(self.folder))
        for path, reason in skipped:
            reporter.emit(CheckpointSkipped(path, reason))
        if newest is None:
            if skipped:
                reporter.emit(Note("no intact checkpoint is left: the run starts from the beginning"))
            return Record(Progress(), {})
        state, tensors, earlier = _read(newest)
        if state.plan not in plan_hashes:
            raise StorageError(
                f"{newest} belongs to another recipe, or to other settings of this one; {_REMEDY}"
            )
        _check_fit(newest, self.student.state_shapes(), tensors)
        self.student.load_state(tensors)
        try:
            self.snapshots.load_state(earlier)
        except StorageError as error:
            raise StorageError(f"{newest}: {error}; {_REMEDY}") from error
        return Record(state.progress, state.seconds)

    def _path(self, progress: Progress) -> Path:
        return self.folder / f"step-{progress.update}"


@contextmanager
def written_by_first(target: Path, ranks: Communicator) -> Iterator[Path]:
    """Create a folder atomically: rank 0 writes it, and all ranks see it when the context ends.

    Other ranks get its name and write nothing. Collective; raises as `atomic_folder`.
    """
    if ranks.is_first:
        with atomic_folder(target) as folder:
            yield folder
    else:
        yield target
    ranks.gather(None)


def _newest(checkpoints: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the newest intact checkpoint, and newer ones, set aside, with their faults."""
    newest, skipped = newest_valid(checkpoints)
    for path, _ in skipped:
        set_aside(path)  # frees its number for the checkpoint that replaces it
    return newest, list(skipped)


def _write_tensors(tensors: Iterable[tuple[str, Tensor]], folder: Path, stem: str) -> None:
    """Write tensors in order to `stem.safetensors`, and if there are many to `stem-2.safetensors`, ..."""
    held: dict[str, Tensor] = {}
    number = num_bytes = 0

    def flush() -> None:
        name = stem if number == 1 else f"{stem}-{number}"
        save_file(held, folder / f"{name}.safetensors")
        held.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held and num_bytes + size > _MAX_FILE_BYTES:
            number, num_bytes = number + 1, 0
            flush()
        held[name] = tensor.cpu().contiguous()
        num_bytes += size
    if held:
        number += 1
        flush()


def _read_tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    files = [*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-*.safetensors")]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _read(folder: Path) -> tuple[_State, dict[str, Tensor], dict[str, Tensor]]:
    """Read state, student and snapshots of a checkpoint whose manifest matches, of any run."""
    with named_failures("read", folder):
        try:
            document = json.loads((folder / "state.json").read_bytes())
            version = document.get("format") if isinstance(document, dict) else None
            if version == FORMAT:
                state = _State.model_validate(document)
                return state, _read_tensors(folder, _STUDENT), _read_tensors(folder, _PAST)
        except ValidationError as error:
            faults = ", ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise StorageError(f"{folder}/state.json is not that of a run ({faults}); {_REMEDY}") from error
        except (ValueError, FileNotFoundError, SafetensorError) as error:
            raise StorageError(f"{folder} is not a checkpoint of a run ({error}); {_REMEDY}") from error
    raise StorageError(
        f"{folder} has format {version!r}, and this version of mergeopd reads {FORMAT}; {_REMEDY}"
    )


def _check_fit(folder: Path, own: Mapping[str, tuple[int, ...]], saved: Mapping[str, Tensor]) -> None:
    """Raise StorageError where the checkpoint's weights have other shapes than the student's."""
    for name, shape in own.items():
        if name in saved and tuple(saved[name].shape) != shape:
            raise StorageError(
                f"{folder} is of another student: {name.removeprefix('master.')} is "
                f"{list(saved[name].shape)} there and {list(shape)} here; {_REMEDY}"
            )
