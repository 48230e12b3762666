"""Check the process grid of a recipe against the model's sizes and the number of processes."""

from __future__ import annotations

from pathlib import Path

from mergeopd.errors import Location, Problem, RecipeError
from mergeopd.messages import shown
from mergeopd.models.facts import ModelFacts
from mergeopd.preflight.problems import Findings
from mergeopd.recipe.models import Student
from mergeopd.recipe.plan import Plan
from mergeopd.student.grid_sizes import GridError, GridSizes
from mergeopd.student.megatron.architecture import Architecture, count_problem


def check_backend(findings: Findings, student: Student, facts: ModelFacts) -> None:
    """Report architectures that Megatron does not support, and grids that do not divide the model's sizes."""
    if student.backend == "torch":
        return
    arch = findings.attempt(("student", "backend"), lambda: Architecture.read(facts))
    grid = student.parallel
    sizes = {"tensor": grid.tensor, "pipeline": grid.pipeline, "expert": grid.expert}
    for problem in () if arch is None else arch.split_problems(**sizes, sequence=grid.sequence):
        findings.report(("student", "parallel", problem.key), problem.message, problem.remedy)


def check_processes(plan: Plan, world: int) -> None:
    """Raise RecipeError if `world` processes cannot train this plan's student."""
    grid = plan.student.parallel
    if plan.student.backend == "torch":
        try:
            GridSizes.of(grid, world)
        except GridError as error:
            message, remedy = str(error), error.remedy
        else:
            return
    else:
        needed = grid.smallest_world
        sizes = {"tensor": grid.tensor, "pipeline": grid.pipeline, "expert": grid.expert}
        problem = count_problem(world, **sizes, context=grid.context)
        if problem is None:
            return
        message = problem
        remedy = f"start {needed} or a multiple of it: mergeopd run --nproc {needed}, or torchrun"
    location = Location(shown(Path(plan.recipe_file)))
    raise RecipeError([Problem(location, "student.parallel", message, remedy)])
