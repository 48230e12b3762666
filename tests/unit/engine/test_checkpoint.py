"""Checkpoints: order of writes, and restored state."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine import checkpoint
from mergeopd.engine.checkpoint import Checkpoints, Record
from mergeopd.engine.models import Machine, load_models
from mergeopd.engine.progress import Progress
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.jsonl import RecordsReporter
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
        kept.save(Record(Progress(1, 1, 4), {"total": 0.1}), RecordsReporter(**files))
    assert order.index(str(path)) < order.index(str(tmp_path / "c" / "step-1"))


@pytest.mark.parametrize("max_bytes", [2_000, checkpoint._MAX_FILE_BYTES])
def test_a_saved_state_is_restored(
    write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_bytes: int
) -> None:
    """In one file or in many, of which none is larger than it may be or has more than one tensor that is."""
    monkeypatch.setattr(checkpoint, "_MAX_FILE_BYTES", max_bytes)
    parts = load_models(preflight(write_job()), Machine(CPU, SingleProcess()))
    record = Record(Progress(7, 5, 28), {"rollout": 0.1 + 0.2, "total": 1e300})
    kept = Checkpoints(tmp_path, parts.plan, parts.student, parts.snapshots, SingleProcess())
    kept.save(record, Silent())
    files = list((tmp_path / "step-7").glob("*.safetensors"))
    assert (len(files) > 9) == (max_bytes == 2_000)
    for file in files:
        tensors = load_file(file).values()
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors) <= max_bytes
    expected = {name: tensor.clone() for name, tensor in parts.student.state()}
    with torch.no_grad():
        for tensor in dict(parts.student.state()).values():
            tensor += 1
    assert kept.restore([parts.plan.hash], Silent()) == record
    found = dict(parts.student.state())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_without_checkpoints_it_is_the_beginning(write_job: Callable[..., Path], tmp_path: Path) -> None:
    parts = load_models(preflight(write_job()), Machine(CPU, SingleProcess()))
    kept = Checkpoints(tmp_path / "none", parts.plan, parts.student, parts.snapshots, SingleProcess())
    assert kept.restore([], Silent()) == Record(Progress(), {})
