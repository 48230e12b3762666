"""Is there memory for the copies of the student that write? Known before a weight is read."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch

from mergeopd.errors import ModelError
from mergeopd.models.causal import DTYPES
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.ranks import Ranks
from mergeopd.recipe.plan import Plan

_GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup")
# Float32 main parameter, gradient and two moments, beside the parameter itself.
_TRAINING_BYTES = 16


def refuse_without_room(plan: Plan, device: torch.device, ranks: Ranks) -> None:
    """Raise ModelError where a process's whole copy of the student, beside its training, does not fit.

    Every process writes its share of the answers with a copy of its own. Counted are weights alone: what
    activations and caches take is known only when they are there.
    """
    checkpoint = Checkpoint.open(Path(plan.student.model))
    num_weights = sum(prod(info.shape) for info in checkpoint.tensors.values())
    width = DTYPES[plan.student.dtype].itemsize
    parallel = plan.student.parallel
    copy = num_weights * width
    training = num_weights * (width % 4 + _TRAINING_BYTES) / (parallel.tensor * parallel.pipeline)
    sharers = 1 if device.type == "cuda" else ranks.num_local
    free = free_bytes(device)
    if sharers * (copy + training) > free:
        where = "the GPU of this process" if device.type == "cuda" else "this machine"
        parts = (f"{sharers} x {size / _GIB:.2f} GiB" for size in (copy, training))
        raise ModelError(
            f"{plan.student.model} does not fit: {next(parts)} for whole copies that write answers and "
            f"{next(parts)} to train are more than the {free / _GIB:.2f} GiB that {where} has free; "
            "use more machines or fewer processes on each, or student.dtype: bfloat16"
        )


def free_bytes(device: torch.device) -> int:
    """What is free on the device; on a CPU what the system can give, within the limit of its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(min(psutil.virtual_memory().available, _free_in_container()))


def _free_in_container() -> int | float:
    """What the control group allows besides what is used; the file cache is given back when it is needed."""
    try:
        limit, used, stat = (
            (_CGROUP / name).read_text() for name in ("memory.max", "memory.current", "memory.stat")
        )
    except OSError:
        return float("inf")
    if limit.strip() == "max":
        return float("inf")
    cached = next((int(line.split()[1]) for line in stat.splitlines() if line.startswith("file ")), 0)
    return int(limit) - int(used) + cached
