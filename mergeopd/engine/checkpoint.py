"""Checkpoints: the student, its optimizer, its snapshots, and the progress of the run."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from mergeopd.config.values import Strict
from mergeopd.distributed.communicator import Communicator
from mergeopd.engine.progress import Progress
from mergeopd.errors import StorageError
from mergeopd.preflight.memory import free_bytes
from mergeopd.recipe.plan import Plan
from mergeopd.reporting.events import CheckpointSaved, CheckpointSkipped, Note, Reporter, StageStarted
from mergeopd.storage.failures import named_failures
from mergeopd.storage.folders import (
    Manifest,
    atomic_folder,
    begin_folder,
    content_fault,
    numbered,
    prune,
    read_manifest,
    set_aside,
)
from mergeopd.storage.parallel_save import ParallelSave, SaveFolder
from mergeopd.storage.state_parts import (
    INDEX,
    PartsFolder,
    StagedFile,
    StatePart,
    dealt_parts,
    num_bytes,
    save_of,
    staged,
)
from mergeopd.student.protocol import Stateful
from mergeopd.teacher.snapshots import StudentSnapshots

FORMAT = 2
_STUDENT, _PAST, _STATE = "student", "past", "state.json"
_GIB = 2**30
# Interval at which ranks that wait for a save agree on whether it is complete.
_WAIT_S = 0.05
# How long a run that fails waits for the other ranks, and one that is interrupted twice for its own writing.
_GRACE_S = 5.0
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


class Checkpoints:
    """The newest checkpoints of a run, in a folder.

    A save is written in the background if the memory of every machine has room for a copy of what its ranks
    write; at most one is in flight. `saved` is the update of the newest one that this process has completed.
    """

    saved: int | None = None

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        student: Stateful,
        snapshots: StudentSnapshots,
        ranks: Communicator,
    ) -> None:
        self._folder, self._plan, self._ranks = folder, plan, ranks
        self._student, self._snapshots = student, snapshots
        self._saving: tuple[int, ParallelSave] | None = None
        self._has_noted = False

    def has(self, progress: Progress) -> bool:
        return self._path(progress).exists()

    def save(self, record: Record, reporter: Reporter) -> None:
        """Copy the state and write it as a checkpoint in the background, after an earlier one. Collective.

        Every rank writes its own parts. The checkpoint appears when all are on the disk; then the oldest ones
        beyond `checkpoint.keep` are deleted. Without room for the copy, returns when it is written. Raises
        StorageError as `poll`.
        """
        self.finish(reporter)
        reporter.emit(StageStarted("checkpoint"))
        target = self._path(record.progress)
        folder = self._ranks.run_on_first(lambda: _begun(target))
        state = _State(
            format=FORMAT, plan=self._plan.hash, progress=record.progress, seconds=dict(record.seconds)
        )
        saving = ParallelSave(
            folder,
            self._ranks.rank,
            self._ranks.size,
            {_STATE: state.model_dump_json()},
            lambda: prune(self._folder, self._plan.checkpoint.keep),
        )
        self._saving = record.progress.update, saving
        groups = {_STUDENT: list(self._student.state()), _PAST: self._own_snapshots()}
        if self._has_room(groups, reporter):
            saving.start(list(_staged(groups)))
        else:
            saving.start(_staged(groups))
            self.finish(reporter)

    def poll(self, reporter: Reporter) -> None:
        """Report the save in flight when it is complete. Collective.

        Raises StorageError where writing failed, PeerFailed on the other ranks; earlier checkpoints are kept.
        """
        if self._saving is None:
            return
        update, saving = self._saving
        is_done = self._ranks.run_and_gather(saving.is_done)
        if all(is_done):
            self._saving, self.saved = None, update
            reporter.emit(CheckpointSaved(update, saving.folder.target))
        elif all(is_done[1:]):
            saving.peers_are_done()

    def finish(self, reporter: Reporter) -> None:
        """Wait for the save in flight, if there is one. Collective; raises as `poll`."""
        self.poll(reporter)
        while self._saving is not None:
            self._saving[1].wait(_WAIT_S)
            self.poll(reporter)

    def close(self, *, at_once: bool) -> None:
        """Let the save in flight end after a failure of the run. Not collective.

        The checkpoint is completed if the other ranks write their parts soon; with `at_once`, if it is small.
        """
        if self._saving is not None:
            _, saving = self._saving
            saving.wait(_GRACE_S if at_once or self._ranks.size > 1 else None)
            saving.abandon()

    def restore(self, plan_hashes: Collection[str], reporter: Reporter) -> Record:
        """Load the newest intact checkpoint; start from the beginning when there is none. Collective.

        Damaged ones are reported and set aside; the ranks divide the reading of what is compared with the
        manifests. `plan_hashes` are the present and former ones of the run folder. Raises StorageError for an
        intact checkpoint of another plan, model or format.
        """
        newest, skipped = self._newest()
        for path, reason in skipped:
            reporter.emit(CheckpointSkipped(path, reason))
        if newest is None:
            if skipped:
                reporter.emit(Note("no intact checkpoint is left: the run starts from the beginning"))
            return Record(Progress(), {})
        state, index = _read(newest)
        if state.plan not in plan_hashes:
            raise StorageError(
                f"{newest} belongs to another recipe, or to other settings of this one; {_REMEDY}"
            )
        tensors = PartsFolder.open_group(newest, index, _STUDENT)
        _check_fit(newest, self._student.state_shapes(), tensors.shapes)
        with named_failures("read", newest):
            try:
                self._student.load_state(tensors)
                self._snapshots.load_state(PartsFolder.open_group(newest, index, _PAST))
            except StorageError as error:
                raise StorageError(f"{newest}: {error}; {_REMEDY}") from error
        return Record(state.progress, state.seconds)

    def _path(self, progress: Progress) -> Path:
        return self._folder / f"step-{progress.update}"

    def _own_snapshots(self) -> list[StatePart]:
        """Return this rank's share of the snapshots, which all ranks have."""
        return list(dealt_parts(self._snapshots.state(), self._ranks.rank, self._ranks.size))

    def _has_room(self, groups: Mapping[str, list[StatePart]], reporter: Reporter) -> bool:
        """Whether each machine has twice the memory that copies of its ranks' parts need. Collective."""
        own = sum(map(num_bytes, groups.values()))
        needs = self._ranks.gather((own, free_bytes(torch.device("cpu"))))
        for machine in dict.fromkeys(self._ranks.machines):
            on_it = [need for need, at in zip(needs, self._ranks.machines, strict=True) if at == machine]
            size, free = sum(need for need, _ in on_it), min(free for _, free in on_it)
            if 2 * size > free:
                if not self._has_noted:
                    reporter.emit(
                        Note(
                            f"training waits while checkpoints are written: a copy of {size / _GIB:,.2f} GiB "
                            f"needs twice as much free memory, and there are {free / _GIB:,.2f} GiB"
                        )
                    )
                self._has_noted = True
                return False
        return True

    def _newest(self) -> tuple[Path | None, list[tuple[Path, str]]]:
        """Return the newest intact checkpoint, and newer ones, set aside, with their faults. Collective."""
        skipped: list[tuple[Path, str]] = []
        for folder in self._ranks.run_on_first(lambda: numbered(self._folder)):
            fault = self._fault(folder)
            if fault is None:
                return folder, skipped
            if self._ranks.is_first:
                set_aside(folder)  # frees its number for the checkpoint that replaces it
            skipped.append((folder, fault))
        return None, skipped

    def _fault(self, folder: Path) -> str | None:
        """Return the first fault of a checkpoint; each rank reads some of its files. Collective."""
        files = self._ranks.run_on_first(lambda: read_manifest(folder))
        if isinstance(files, str):
            return files
        by_size = sorted(files, key=lambda name: (files[name]["bytes"], name))
        own = {name: files[name] for name in by_size[self._ranks.rank :: self._ranks.size]}
        faults = self._ranks.run_and_gather(lambda: _save_fault(folder, own) or content_fault(folder, own))
        return next(filter(None, faults), None)


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


def _begun(target: Path) -> SaveFolder:
    """Create the temporary folder of a save; ranks of an earlier process cannot write into it by mistake."""
    save = uuid.uuid4().hex
    return SaveFolder(target, begin_folder(target, f"-{save}"), save)


def _staged(groups: Mapping[str, list[StatePart]]) -> Iterator[tuple[str, StagedFile]]:
    for group, parts in groups.items():
        for file in staged(parts):
            yield group, file


def _save_fault(folder: Path, files: Manifest) -> str | None:
    """Return the first of the files that is of another save than the index. Reads headers only."""
    if not (folder / INDEX).is_file():
        return None
    try:
        own = json.loads((folder / INDEX).read_bytes())["save"]
    except (ValueError, KeyError, TypeError):
        return None  # the manifest tells whether it is damaged
    for name in files:
        other = save_of(folder / name) if name.endswith(".safetensors") else own
        if other not in (own, None):
            return f"{name} is of another save of this update ({other}) than {INDEX} ({own})"
    return None


def _read(folder: Path) -> tuple[_State, Mapping[str, Any]]:
    """Read state and index of a checkpoint whose manifest matches, of any run."""
    with named_failures("read", folder):
        try:
            document = json.loads((folder / _STATE).read_bytes())
            version = document.get("format") if isinstance(document, dict) else None
            if version == FORMAT:
                index: dict[str, Any] = json.loads((folder / INDEX).read_bytes())
                return _State.model_validate(document), index
        except ValidationError as error:
            faults = ", ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise StorageError(f"{folder}/{_STATE} is not that of a run ({faults}); {_REMEDY}") from error
        except (ValueError, FileNotFoundError) as error:
            raise StorageError(f"{folder} is not a checkpoint of a run ({error}); {_REMEDY}") from error
    raise StorageError(
        f"{folder} has format {version!r}, and this version of mergeopd reads {FORMAT}; finish "
        f"the run with the version that its plan.yaml names, or {_REMEDY}"
    )


def _check_fit(
    folder: Path, own: Mapping[str, tuple[int, ...]], saved: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise StorageError where the checkpoint's weights have other shapes than the student's."""
    for name, shape in own.items():
        if name in saved and saved[name] != shape:
            raise StorageError(
                f"{folder} is of another student: {name.removeprefix('master.')} is "
                f"{list(saved[name])} there and {list(shape)} here; {_REMEDY}"
            )
