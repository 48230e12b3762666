"""Numbers of processes that can train a plan's student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mergeopd.errors import RecipeError
from mergeopd.preflight.parallelism import check_processes
from mergeopd.recipe.models import Parallel, Student
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.resolve import read
from mergeopd.student.grid_sizes import GridSizes


@pytest.fixture
def plan(
    write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Plan]:
    """The job's plan with another student."""
    monkeypatch.chdir(tmp_path)
    plan = read(write_job()).plan
    assert plan is not None

    def with_student(**student: object) -> Plan:
        return plan.model_copy(update={"student": Student(model=plan.student.model, **student)})  # type: ignore[arg-type]

    return with_student


@pytest.mark.parametrize(("tensor", "pipeline", "world"), [(1, 1, 1), (1, 1, 3), (2, 2, 4), (2, 3, 12)])
def test_grids_that_processes_fill(plan: Callable[..., Plan], tensor: int, pipeline: int, world: int) -> None:
    check_processes(plan(backend="megatron", parallel={"tensor": tensor, "pipeline": pipeline}), world)


def test_a_grid_for_more_processes_than_there_are(plan: Callable[..., Plan]) -> None:
    with pytest.raises(RecipeError) as caught:
        check_processes(plan(backend="megatron", parallel={"tensor": 2, "pipeline": 2}), 1)
    assert str(caught.value) == (
        "job.yaml  student.parallel\n"
        "    tensor 2 x pipeline 2 = 4 does not divide the number of processes, 1; "
        "start 4 or a multiple of it: mergeopd run --nproc 4, or torchrun"
    )


def test_context_ranks_are_part_of_a_replica(plan: Callable[..., Plan]) -> None:
    split = plan(backend="megatron", parallel={"tensor": 2, "context": 2})
    check_processes(split, 8)
    with pytest.raises(RecipeError, match=r"pipeline 1 x context 2 = 4 does not divide .* 6; start 4 or a"):
        check_processes(split, 6)


def test_experts_are_divided_among_the_processes_of_a_stage(plan: Callable[..., Plan]) -> None:
    parallel = {"tensor": 2, "pipeline": 2, "expert": 4, "sequence": True}
    check_processes(plan(backend="megatron", parallel=parallel), 8)
    with pytest.raises(RecipeError) as caught:
        check_processes(plan(backend="megatron", parallel=parallel), 4)
    assert str(caught.value) == (
        "job.yaml  student.parallel\n"
        "    expert 4 x pipeline 2 = 8 does not divide the number of processes, 4; "
        "start 8 or a multiple of it: mergeopd run --nproc 8, or torchrun"
    )


@pytest.mark.parametrize(
    ("parallel", "world", "sizes"),
    [
        ({}, 1, (1, 1)),
        ({}, 6, (1, 6)),
        ({"shard": 2}, 6, (3, 2)),
        ({"data": 2}, 6, (2, 3)),
        ({"data": 3, "shard": 2}, 6, (3, 2)),
        ({"shard": 1}, 6, (6, 1)),
    ],
)
def test_sizes_that_are_left_open_are_what_remains(
    plan: Callable[..., Plan], parallel: dict[str, int], world: int, sizes: tuple[int, int]
) -> None:
    check_processes(plan(parallel=parallel), world)
    assert GridSizes.of(Parallel(**parallel), world) == GridSizes(*sizes)


@pytest.mark.parametrize(
    ("parallel", "world", "text"),
    [
        (
            {"shard": 4},
            6,
            "shard 4 does not divide the number of processes, 6; "
            "start 4 or a multiple of it: mergeopd run --nproc 4, or use `shard: 3` or `shard: 6`",
        ),
        (
            {"data": 2},
            1,
            "data 2 does not divide the number of processes, 1; "
            "start 2 or a multiple of it: mergeopd run --nproc 2, or use `data: 1`",
        ),
        (
            {"data": 2, "shard": 3},
            4,
            "data 2 x shard 3 = 6 is not the number of processes, 4; start 6: mergeopd run --nproc 6, or use "
            "`{data: 2, shard: 2}` or `{data: 1, shard: 4}`",
        ),
    ],
)
def test_a_shard_grid_that_the_processes_do_not_form(
    plan: Callable[..., Plan], parallel: dict[str, int], world: int, text: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        check_processes(plan(parallel=parallel), world)
    assert str(caught.value) == f"job.yaml  student.parallel\n    {text}"


def test_the_grid_may_change_and_the_backend_may_not(plan: Callable[..., Plan]) -> None:
    one = plan(backend="megatron")
    grid = Parallel(tensor=2, pipeline=2, sequence=True, recompute=True, layers="local")
    other = plan(backend="megatron", parallel=grid)
    assert one.hash == other.hash
    assert one.content == other.content
    assert "parallel" not in one.content["student"]
    assert one.hash != plan().hash
    assert {"recipe_file", "output", "memory", "text_cache", "report"}.isdisjoint(one.content)
