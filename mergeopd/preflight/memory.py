"""Is there memory for the copies of the student that write? Known before a weight is read."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch

from mergeopd.distributed.communicator import Communicator
from mergeopd.errors import ModelError
from mergeopd.messages import joined
from mergeopd.models.causal import DTYPES
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.recipe.plan import Plan

_GIB = 2**30
_CGROUP, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Bytes of a weight: float32 gradient; float32 moments, which the copies of the student share among them.
_GRADIENT, _MOMENTS, _MAIN = 4, 8, 4


def refuse_without_room(plan: Plan, device: torch.device, ranks: Communicator) -> None:
    """Raise ModelError where a process's whole copies of the student, beside its training, do not fit.

    Every process writes its share of the answers with a copy of its own, and keeps one for each rule by which
    teachers follow the student. Counted are weights alone: what activations and caches take is known only
    when they are there.
    """
    checkpoint = Checkpoint.open(Path(plan.student.model))
    num_weights = sum(prod(info.shape) for info in checkpoint.tensors.values())
    width = DTYPES[plan.student.dtype].itemsize
    parts = {
        "for whole copies that write answers": num_weights * width,
        "for weights that follow the student": num_weights * _follower_bytes(plan, width),
        "to train": num_weights * _training_bytes(plan, width, ranks.size),
    }
    sharers = 1 if device.type == "cuda" else ranks.num_local
    free = free_bytes(device)
    if sharers * sum(parts.values()) > free:
        where = "the GPU of this process" if device.type == "cuda" else "this machine"
        listed = [f"{sharers} x {size / _GIB:.2f} GiB {what}" for what, size in parts.items() if size]
        raise ModelError(
            f"{plan.student.model} does not fit: {joined(listed, 'and')} are more than the "
            f"{free / _GIB:.2f} GiB that {where} has free; "
            "use more machines or fewer processes on each, or student.dtype: bfloat16"
        )


def _follower_bytes(plan: Plan, width: int) -> int:
    """Of all weights that follow the student, for each of its own: averages are float32."""
    rules = {t.snapshot_rule for t in plan.teachers.values() if t.snapshot_rule is not None}
    return sum(width if rule.ema is None else _MAIN for rule in rules)


def _training_bytes(plan: Plan, width: int, world: int) -> float:
    """Of a process, for each weight of the student: the parameter, its gradient, and what AdamW keeps.

    Several data-parallel copies divide the latter: float32 moments, and main parameters where the forward
    pass has others.
    """
    parallel = plan.student.parallel
    model = parallel.tensor * parallel.pipeline
    shared = _MOMENTS + (_MAIN if width < _MAIN else 0)
    return (width + _GRADIENT + shared / (world // model)) / model


def free_bytes(device: torch.device) -> int:
    """What is free on the device; on a CPU what the system can give, within the limit of its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(min(psutil.virtual_memory().available, _free_in_container()))


def _free_in_container() -> int | float:
    """What the control groups that this process is in, one within another, allow besides what is used.

    In a container there is one, at the root; a job of Slurm has its own somewhere below it.
    """
    try:
        lines = _OWN_GROUP.read_text().splitlines()
    except OSError:
        return float("inf")
    path = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    own = _CGROUP / path
    return min(_free_in_group(folder) for folder in (own, *own.parents) if folder.is_relative_to(_CGROUP))


def _free_in_group(folder: Path) -> int | float:
    """The file cache is given back when it is needed."""
    try:
        limit, used, stat = (
            (folder / name).read_text() for name in ("memory.max", "memory.current", "memory.stat")
        )
    except OSError:
        return float("inf")
    if limit.strip() == "max":
        return float("inf")
    cached = next((int(line.split()[1]) for line in stat.splitlines() if line.startswith("file ")), 0)
    return int(limit) - int(used) + cached
