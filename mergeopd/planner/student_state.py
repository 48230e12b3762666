"""What a rank holds of the student all the time: weights, gradients, the optimizer's state, snapshots."""

from __future__ import annotations

from collections.abc import Iterator

from mergeopd.planner.setup import Setup

OFFLOADED = "optimizer: moments on the host"
_FLOAT32 = 4


def student_state(setup: Setup, stage: int) -> Iterator[tuple[str, float]]:
    """Yield the bytes of a rank of a pipeline stage, by part."""
    weights, width = setup.stage_weights(stage), setup.itemsize
    shards = setup.grid.holders if setup.is_megatron else 1
    yield "weights", weights * width
    moments = OFFLOADED if setup.plan.optimizer.offload else "optimizer: moments"
    yield moments, weights * 2 * max(width, _FLOAT32) / shards
    yield "optimizer: main weights", weights * _FLOAT32 / shards if width < _FLOAT32 else 0
    if setup.is_megatron:
        yield "gradients", weights * _FLOAT32
    yield "snapshots of the student", _snapshots(setup)


def replica_bytes(setup: Setup) -> float:
    """Return the bytes of an unsharded student beside this rank's part, with which it generates."""
    return setup.student.parameters * setup.itemsize if setup.needs_replica else 0.0


def _snapshots(setup: Setup) -> float:
    rules = {t.snapshot_rule for t in setup.plan.teachers.values() if t.snapshot_rule is not None}
    widths = [setup.itemsize if rule.ema is None else _FLOAT32 for rule in rules]
    return sum(widths) * setup.student.parameters
