"""Estimate, before reading weights, whether the student's replicas and training state fit in memory."""

from __future__ import annotations

import resource
import sys
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from mergeopd.distributed.communicator import Communicator
from mergeopd.errors import ModelError
from mergeopd.messages import joined
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.experts import is_of_expert
from mergeopd.models.facts import ModelFacts
from mergeopd.models.residency import ITEMSIZE
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.rollout import LocalRollout
from mergeopd.student.grid_sizes import GridSizes

if TYPE_CHECKING:
    import torch

_GIB = 2**30
_CGROUP, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Bytes per weight: float32 gradient; float32 moments and main parameter, sharded over data-parallel replicas.
_GRADIENT, _MOMENTS, _MAIN = 4, 8, 4


def refuse_without_room(plan: Plan, device: torch.device, ranks: Communicator) -> None:
    """Raise ModelError if the student's replicas, snapshots and training state do not fit.

    If the rollout engine needs it, every process has an unsharded replica; it keeps a snapshot for each rule
    of self-teachers.
    Activations and caches are not counted, because their size is not known before the run.
    """
    parts = student_bytes(plan, ranks.size, on_gpu=device.type == "cuda")
    sharers = 1 if device.type == "cuda" else ranks.num_local
    free = free_bytes(device)
    if sharers * sum(parts.values()) > free:
        where = "the GPU of this process" if device.type == "cuda" else "this machine"
        listed = [f"{sharers} x {size / _GIB:.2f} GiB {what}" for what, size in parts.items() if size]
        raise ModelError(
            f"{plan.student.model} does not fit: {joined(listed, 'and')} are more than the "
            f"{free / _GIB:.2f} GiB that {where} has free; "
            "use more machines or fewer processes on each, student.dtype: bfloat16, or inference servers "
            "(rollout.engine: vllm or sglang), which need no replica here"
        )


def student_bytes(plan: Plan, world: int, *, on_gpu: bool) -> dict[str, float]:
    """Return the bytes of a process for the student in a run of `world` processes, by purpose.

    On a GPU, without what is offloaded to the host.
    """
    checkpoint = Checkpoint.open(Path(plan.student.model))
    num_weights, model_type = checkpoint.num_weights, ModelFacts.read(checkpoint.folder).model_type
    of_experts = sum(
        prod(info.shape) for name, info in checkpoint.tensors.items() if is_of_expert(model_type, name)
    )
    width = ITEMSIZE[plan.student.dtype]
    layerwise = isinstance(plan.rollout, LocalRollout) and plan.rollout.gather == "layer"
    is_sharded = plan.student.backend == "megatron" or world > 1
    is_copied = is_sharded and plan.rollout.capabilities.needs_replica and not layerwise
    return {
        "for unsharded replicas that generate": num_weights * (width if is_copied else 0),
        "for snapshots of the student": num_weights * _snapshot_bytes(plan, width),
        "for training": _training_bytes(
            plan, width, world, num_weights - of_experts, of_experts, on_gpu=on_gpu
        ),
    }


def _snapshot_bytes(plan: Plan, width: int) -> int:
    """Bytes of all snapshots per weight of the student; averages are float32."""
    rules = {t.snapshot_rule for t in plan.teachers.values() if t.snapshot_rule is not None}
    return sum(width if rule.ema is None else _MAIN for rule in rules)


def _training_bytes(
    plan: Plan, width: int, world: int, common: int, of_experts: int, *, on_gpu: bool
) -> float:
    """Bytes per process of the student's parameters, gradients and AdamW state.

    Megatron's processes with the same parameters shard the state: float32 moments, and main parameters if the
    dtype is smaller. Experts are divided over other processes than the `common` parameters. FSDP shards
    everything; the shards are main parameters.
    """
    parallel, moments = plan.student.parallel, 0 if plan.optimizer.offload and on_gpu else _MOMENTS
    if plan.student.backend == "torch" and world > 1:
        per_weight = (_MAIN + _GRADIENT + moments) * max(1, width // _MAIN)
        return (common + of_experts) * per_weight / GridSizes.of(parallel, world).shard
    state = moments + (_MAIN if width < _MAIN else 0)
    total = 0.0
    for num_weights, ways in ((common, parallel.tensor), (of_experts, parallel.expert)):
        parts = ways * parallel.pipeline
        total += num_weights * (width + _GRADIENT + state / (world // parts)) / parts
    return total


def free_bytes(device: torch.device) -> int:
    """Free memory of the device; on a CPU, within the limit of the container."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return free_host_bytes()


def free_host_bytes() -> int:
    """Free main memory, within the limit of the container."""
    import psutil

    return int(min(psutil.virtual_memory().available, _free_in_container()))


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process has had: on its GPU, or resident with its mapped files."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024  # Linux counts KiB


def _free_in_container() -> int | float:
    """Free memory within the limits of this process's nested control groups.

    A container has one group, at the root; a Slurm job has its own below.
    """
    try:
        lines = _OWN_GROUP.read_text().splitlines()
    except OSError:
        return float("inf")
    path = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    own = _CGROUP / path
    return min(_free_in_group(folder) for folder in (own, *own.parents) if folder.is_relative_to(_CGROUP))


def _free_in_group(folder: Path) -> int | float:
    # The file cache counts as free, because it is reclaimed on demand.
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
