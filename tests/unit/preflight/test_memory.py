"""Estimated memory of student replicas, against counts by hand."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mergeopd.errors import ModelError
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.preflight import memory as room
from mergeopd.preflight.memory import refuse_without_room
from mergeopd.recipe.models import Parallel, SnapshotRule
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.resolve import read
from mergeopd.recipe.rollout import LocalRollout
from mergeopd.rollout.protocol import EngineCapabilities

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def plan(write_job: Callable[..., Path]) -> Callable[..., Plan]:
    """The job's plan with another student, and teachers that follow it by these rules."""
    plan = read(write_job()).plan
    assert plan is not None

    def changed(*rules: SnapshotRule, **student: object) -> Plan:
        teachers = dict(plan.teachers)
        some = next(iter(teachers.values()))
        for number, rule in enumerate(rules):
            teachers[f"self-{number}"] = some.model_copy(update={"student": rule})
        new = plan.student.model_copy(update={"backend": "megatron", **student})
        return plan.model_copy(update={"student": new, "teachers": teachers})

    return changed


def num_weights(plan: Plan) -> int:
    checkpoint = Checkpoint.open(Path(plan.student.model))
    return sum(prod(info.shape) for info in checkpoint.tensors.values())


FLOAT32, BFLOAT16 = {"dtype": "float32"}, {"dtype": "bfloat16"}
HALF = {"parallel": Parallel(tensor=2, pipeline=1)}
SHARDED = {"backend": "torch", "parallel": Parallel(shard=2)}
AVERAGE, SLOWER, COPY = SnapshotRule(ema=0.5), SnapshotRule(ema=0.9), SnapshotRule(every=3)


@pytest.mark.parametrize(
    ("student", "rules", "world", "per_weight"),
    [
        (FLOAT32, (), 1, 4 + 4 + 4 + 8),
        (BFLOAT16, (), 1, 2 + 2 + 4 + 12),
        (FLOAT32 | HALF, (), 2, 4 + (4 + 4 + 8) / 2),
        # Copies share what AdamW keeps, and nothing else.
        (FLOAT32, (), 4, 4 + 4 + 4 + 8 / 4),
        (BFLOAT16 | HALF, (), 8, 2 + (2 + 4 + 12 / 4) / 2),
        # FSDP shards everything; only the replica that generates is whole.
        (FLOAT32 | SHARDED, (), 4, 4 + (4 + 4 + 8) / 2),
        (BFLOAT16 | SHARDED, (), 4, 2 + (4 + 4 + 8) / 2),
        # A whole copy for each rule, however many teachers have it: averages in float32, others as they are.
        (BFLOAT16, (AVERAGE, AVERAGE, SLOWER, COPY), 1, 20 + 4 + 4 + 2),
    ],
)
def test_memory_of_a_process(
    plan: Callable[..., Plan],
    monkeypatch: pytest.MonkeyPatch,
    student: dict[str, object],
    rules: tuple[SnapshotRule, ...],
    world: int,
    per_weight: float,
) -> None:
    tried = plan(*rules, **student)
    needed = per_weight * num_weights(tried)
    on_one_machine = SimpleNamespace(size=world, num_local=world)
    for device, free in ((CUDA, needed), (CPU, world * needed)):
        monkeypatch.setattr(room, "free_bytes", lambda _, free=free: free)
        refuse_without_room(tried, device, on_one_machine)  # type: ignore[arg-type]
        monkeypatch.setattr(room, "free_bytes", lambda _, free=free: free - 1)
        with pytest.raises(ModelError, match=r"does not fit: \d+ x .* GiB for unsharded replicas"):
            refuse_without_room(tried, device, on_one_machine)  # type: ignore[arg-type]


def test_the_refusal_names_the_sizes(plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    tried = plan(AVERAGE, **BFLOAT16)
    monkeypatch.setattr(room, "_GIB", num_weights(tried))
    monkeypatch.setattr(room, "free_bytes", lambda _: 5.5 * num_weights(tried))
    with pytest.raises(ModelError) as caught:
        refuse_without_room(tried, CPU, SimpleNamespace(size=2, num_local=2))  # type: ignore[arg-type]
    assert str(caught.value).endswith(
        "does not fit: 2 x 2.00 GiB for unsharded replicas that generate, 2 x 4.00 GiB for snapshots of "
        "the student and 2 x 12.00 GiB for training are more than the 5.50 GiB that this machine has free; "
        "use more machines or fewer processes on each, student.dtype: bfloat16, or inference servers "
        "(rollout.engine: vllm or sglang), which need no replica here"
    )


class Served(LocalRollout):
    """An engine outside the processes of the run."""

    capabilities = EngineCapabilities(returns_logprobs=True, is_reproducible=False, needs_replica=False)


def test_an_engine_without_replicas_needs_none(
    plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left are the sharded weights, gradients and moments."""
    tried = plan(**FLOAT32, **HALF).model_copy(update={"rollout": Served()})
    needed = 2 * (4 + 4 + 8) / 2 * num_weights(tried)
    ranks = SimpleNamespace(size=2, num_local=2)
    monkeypatch.setattr(room, "free_bytes", lambda _: needed)
    refuse_without_room(tried, CPU, ranks)  # type: ignore[arg-type]
    monkeypatch.setattr(room, "free_bytes", lambda _: needed - 1)
    with pytest.raises(ModelError, match=r"does not fit: 2 x [0-9.]+ GiB for training are more than"):
        refuse_without_room(tried, CPU, ranks)  # type: ignore[arg-type]


def test_the_narrowest_of_the_groups_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A job's limit stands at its own control group, or at one around it."""
    monkeypatch.setattr(room, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(room, "_OWN_GROUP", tmp_path / "own")

    def limit(group: str, maximum: str, used: int, cached: int) -> None:
        folder = tmp_path / "cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("max", maximum), ("current", str(used)), ("stat", f"anon 7\nfile {cached}\n")):
            (folder / f"memory.{name}").write_text(f"{text}\n")

    assert room._free_in_container() == float("inf")
    (tmp_path / "own").write_text("1:cpu:/elsewhere\n0::/slurm/job/task\n")
    assert room._free_in_container() == float("inf")
    limit("slurm/job/task", "max", 900, 0)
    assert room._free_in_container() == float("inf")
    limit("slurm/job", "1000", 900, 50)
    assert room._free_in_container() == 150
    limit("", "800", 700, 0)
    assert room._free_in_container() == 100
    limit("other", "10", 10, 0)
    assert room._free_in_container() == 100


def test_offloaded_moments_of_shards_are_not_on_the_gpu(plan: Callable[..., Plan]) -> None:
    tried = plan(**FLOAT32, **SHARDED)
    tried = tried.model_copy(update={"optimizer": tried.optimizer.model_copy(update={"offload": True})})
    for on_gpu, per_weight in ((True, 4 + 4), (False, 4 + 4 + 8)):
        training = room.student_bytes(tried, 4, on_gpu=on_gpu)["for training"]
        assert training == per_weight / 2 * num_weights(tried)
