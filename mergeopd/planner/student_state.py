"""What a rank holds of the student all the time: weights, gradients, the optimizer's state, snapshots."""

from __future__ import annotations

from collections.abc import Iterator

from mergeopd.planner.setup import Setup

OFFLOADED = "optimizer: moments on the host"
CHECKPOINT = "copy of a checkpoint"
# As in `storage/state_parts.py`: bytes of a file.
_STAGED_BYTES = 1 << 30
_FLOAT32 = 4


def student_state(setup: Setup, stage: int) -> Iterator[tuple[str, float]]:
    """Yield the bytes of a rank of a pipeline stage, by part."""
    weights, width = setup.stage_weights(stage), setup.itemsize
    own = setup.state_weights(stage)
    yield "weights", weights * width
    moments = OFFLOADED if setup.plan.optimizer.offload else "optimizer: moments"
    yield moments, own * 2 * max(width, _FLOAT32)
    yield "optimizer: main weights", own * _FLOAT32 if width < _FLOAT32 else 0
    if setup.is_megatron:
        yield "gradients", weights * _FLOAT32
    yield "snapshots of the student", _snapshots(setup)


def replica_bytes(setup: Setup) -> float:
    """Return the bytes of an unsharded student beside this rank's part, with which it generates."""
    return setup.student.parameters * setup.itemsize if setup.needs_replica else 0.0


def checkpoint_copy(setup: Setup, stage: int) -> float:
    """Return the bytes in main memory of a checkpoint that is written beside training.

    Where a machine has not twice as much free, training waits, and a rank needs one buffer.
    """
    plan = setup.plan
    if sum(phase.updates for phase in plan.phases) <= plan.checkpoint.every:
        return 0.0  # only the last update is followed by one
    own = checkpoint_bytes(setup, stage)
    profile, hardware = setup.hardware.profile, setup.hardware
    room = float(hardware.limit_bytes if profile.is_cpu else hardware.host_limit_bytes or 0)
    if profile.is_cpu:
        room -= sum(num for _, num in student_state(setup, stage))
    return own if 2 * own <= room else min(own, _STAGED_BYTES)


def checkpoint_bytes(setup: Setup, stage: int) -> float:
    """Return the bytes that a rank writes: its part of main weights, moments and snapshots."""
    state = 3 * max(setup.itemsize, _FLOAT32) * setup.state_weights(stage)
    return state + _snapshots(setup) / setup.world


def _snapshots(setup: Setup) -> float:
    rules = {t.snapshot_rule for t in setup.plan.teachers.values() if t.snapshot_rule is not None}
    widths = [setup.itemsize if rule.ema is None else _FLOAT32 for rule in rules]
    return sum(widths) * setup.student.parameters
