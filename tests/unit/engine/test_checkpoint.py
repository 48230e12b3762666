"""Checkpoints: order of writes, and restored state."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from states import joined

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine import checkpoint
from mergeopd.engine.checkpoint import Checkpoints, Record
from mergeopd.engine.models import Machine, load_models
from mergeopd.engine.progress import Progress
from mergeopd.errors import StorageError
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.events import CheckpointSaved, CheckpointSkipped, Note
from mergeopd.reporting.jsonl import RecordsReporter
from mergeopd.storage import state_parts
from mergeopd.storage.metrics import MetricsFile

CPU = torch.device("cpu")


class Silent:
    def emit(self, event: object) -> None:
        pass


KINDS = ("metrics", "samples", "accuracy", "alarms")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="what is synced is read from /proc (Linux)")
@pytest.mark.parametrize("name", KINDS)
def test_the_metrics_are_on_the_disk_before_the_checkpoint_is(
    write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A machine that goes down in between must not find a checkpoint whose updates nobody told of."""
    order: list[str] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        order.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def rename(path: Path, target: Path) -> Path:
        order.append(str(target))
        return real_rename(path, target)

    parts = load_models(preflight(write_job()), Machine(CPU, SingleProcess()))
    files = {kind: MetricsFile(tmp_path / f"{kind}.jsonl") for kind in KINDS}
    path = tmp_path / f"{name}.jsonl"
    with files[name]:
        files[name].append({"update": 1})
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(Path, "rename", rename)
        kept = Checkpoints(tmp_path / "c", parts.plan, parts.student, parts.snapshots, SingleProcess())
        reporter = RecordsReporter(**files)
        kept.save(Record(Progress(1, 1, 4), {"total": 0.1}), reporter)
        kept.finish(reporter)
    assert order.index(str(path)) < order.index(str(tmp_path / "c" / "step-1"))


@pytest.mark.parametrize("max_bytes", [2_000, state_parts._MAX_FILE_BYTES])
def test_a_saved_state_is_restored(
    write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_bytes: int
) -> None:
    """In one file or in many, of which none is larger than it may be or has more than one tensor that is."""
    monkeypatch.setattr(state_parts, "_MAX_FILE_BYTES", max_bytes)
    parts = load_models(preflight(write_job()), Machine(CPU, SingleProcess()))
    record = Record(Progress(7, 5, 28), {"rollout": 0.1 + 0.2, "total": 1e300})
    kept = Checkpoints(tmp_path, parts.plan, parts.student, parts.snapshots, SingleProcess())
    kept.save(record, Silent())
    kept.finish(Silent())
    files = list((tmp_path / "step-7").glob("*.safetensors"))
    assert (len(files) > 9) == (max_bytes == 2_000)
    for file in files:
        tensors = load_file(file).values()
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors) <= max_bytes
    expected = joined(parts.student.state())
    with torch.no_grad():
        for part in parts.student.state():
            part.tensor.add_(1)
    assert kept.restore([parts.plan.hash], Silent()) == record
    found = joined(parts.student.state())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_without_checkpoints_it_is_the_beginning(write_job: Callable[..., Path], tmp_path: Path) -> None:
    parts = load_models(preflight(write_job()), Machine(CPU, SingleProcess()))
    kept = Checkpoints(tmp_path / "none", parts.plan, parts.student, parts.snapshots, SingleProcess())
    assert kept.restore([], Silent()) == Record(Progress(), {})


def saved_twice(checkpoints: Checkpoints) -> None:
    for update in (3, 7):
        checkpoints.save(Record(Progress(update, 1, 4), {}), Silent())
    checkpoints.finish(Silent())


class Kept:
    def __init__(self) -> None:
        self.events: list[object] = []

    def emit(self, event: object) -> None:
        self.events.append(event)


def test_a_file_of_another_save_is_reported_and_the_previous_checkpoint_used(
    write_job: Callable[..., Path], tmp_path: Path
) -> None:
    parts = load_models(preflight(write_job()), Machine(CPU, SingleProcess()))
    kept = Checkpoints(tmp_path, parts.plan, parts.student, parts.snapshots, SingleProcess())
    saved_twice(kept)
    name, shown = "student-1-of-1.safetensors", Kept()
    (tmp_path / "step-3" / name).replace(tmp_path / "step-7" / name)
    again = Checkpoints(tmp_path, parts.plan, parts.student, parts.snapshots, SingleProcess())
    assert again.restore([parts.plan.hash], shown).progress == Progress()
    reasons = [event.reason for event in shown.events if isinstance(event, CheckpointSkipped)]
    assert re.fullmatch(
        rf"{name} is of another save of this update \(\w+\) than index.json \(\w+\)", reasons[0]
    )
    assert reasons[1] == f"{name} is missing"


def test_a_checkpoint_that_cannot_be_written_in_the_background_is_an_error_of_the_next_look(
    write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = load_models(preflight(write_job()), Machine(CPU, SingleProcess()))
    kept_in = tmp_path / "checkpoints"
    kept = Checkpoints(kept_in, parts.plan, parts.student, parts.snapshots, SingleProcess())
    kept.save(Record(Progress(3, 1, 4), {}), Silent())
    kept.finish(Silent())

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state_parts, "save_file", full)
    kept.save(Record(Progress(7, 1, 4), {}), Silent())
    with pytest.raises(StorageError, match=rf"cannot write {kept_in}/step-7: No space left on device"):
        kept.finish(Silent())
    kept.close(at_once=False)
    assert [path.name for path in kept_in.iterdir()] == ["step-3"]


@pytest.mark.parametrize("has_room", [True, False])
def test_a_copy_is_written_while_the_student_changes_if_there_is_room_for_it(
    write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_room: bool
) -> None:
    """The student changes before the writer may begin; without room for a copy, `save` returns when it has ended."""
    begin, save_file = threading.Event(), state_parts.save_file

    def held(*arguments: Any, **options: Any) -> None:
        begin.wait(30.0)
        save_file(*arguments, **options)

    monkeypatch.setattr(state_parts, "save_file", held)
    monkeypatch.setattr(checkpoint, "free_bytes", lambda _: 1 << 40 if has_room else 100)
    parts, shown = load_models(preflight(write_job()), Machine(CPU, SingleProcess())), Kept()
    expected = joined(parts.student.state())
    kept = Checkpoints(tmp_path, parts.plan, parts.student, parts.snapshots, SingleProcess())
    if not has_room:
        begin.set()
    kept.save(Record(Progress(3, 1, 4), {}), shown)
    assert kept.has(Progress(3)) != has_room
    with torch.no_grad():
        for part in parts.student.state():
            part.tensor.add_(1)
    kept.poll(shown)
    begin.set()
    kept.finish(shown)
    notes = [event.text for event in shown.events if isinstance(event, Note)]
    assert [text.partition(":")[0] for text in notes] == (
        [] if has_room else ["training waits while checkpoints are written"]
    )
    assert [event.update for event in shown.events if isinstance(event, CheckpointSaved)] == [3]
    kept.restore([parts.plan.hash], Silent())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in joined(parts.student.state()).items())
