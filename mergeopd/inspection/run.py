"""`mergeopd inspect`: what the teachers of a recipe could teach its student."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from mergeopd.config.suggest import did_you_mean
from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.clock import Clock
from mergeopd.engine.run import announcer, quiet_libraries, report_notes
from mergeopd.errors import Location, Problem, RecipeError
from mergeopd.inspection.finished_run import open_run
from mergeopd.inspection.pairs import Pair
from mergeopd.messages import joined, option_problem, shown
from mergeopd.preflight.inputs import Inputs, preflight
from mergeopd.reporting.contribution import Contribution
from mergeopd.reporting.events import Reporter
from mergeopd.reporting.inspection import Inspection
from mergeopd.reporting.terminal.console import console_reporter


def inspect_recipe(
    recipe: Path,
    overrides: Sequence[str],
    *,
    teachers: Sequence[str] = (),
    prompts: int | None = None,
    gradients: bool = False,
    checkpoints: Sequence[Path] = (),
    cards: Path | None = None,
    console: Console,
) -> Inspection:
    """Inspect the teachers of a recipe with these names, or all, on a sample of its prompts.

    `prompts` replaces `inspect.prompts` of the recipe. With `gradients`, the student also finishes responses
    after other tokens, to compare the teachers' gradients with that of its success. Progress is shown on
    `console`.

    `checkpoints` are folders of models, or folders with such folders in them, that are compared in the place
    of the one teacher that is named, and `cards` is the folder for the cards of the best.

    Raises RecipeError with every problem of the recipe, or for a name that is no teacher's.
    """
    clock = Clock()
    with ExitStack() as opened:
        reporter: AbstractContextManager[Reporter] = console_reporter(console)
        display = opened.enter_context(reporter)
        announce = announcer(display)
        with clock.stage("startup"):
            announce(f"reading {shown(recipe)}")
            inputs = preflight(recipe, overrides, announce=announce, with_servers=False)
            names = _chosen(recipe, inputs, teachers)
            if checkpoints and len(names) > 1:
                raise RecipeError([option_problem("--checkpoints", *_which(names))])
            report_notes(inputs, display)
            announce("importing torch and transformers")
            from mergeopd.engine.models import Machine
            from mergeopd.engine.stages import Stages
            from mergeopd.inspection.inspector import Findings, open_inspector
            from mergeopd.inspection.records import inspection_of
            from mergeopd.models.causal import pick_device

            quiet_libraries()
        machine = Machine(pick_device(), SingleProcess())
        stages = Stages(display, clock, machine.ranks, None)
        inspector = opened.enter_context(
            open_inspector(inputs, names, prompts, machine, stages, with_gradients=gradients)
        )
        if not checkpoints:
            return inspection_of(inspector, inspector.run(), recipe, clock.seconds())
        from mergeopd.inspection.checkpoints import compare_checkpoints

        compared = compare_checkpoints(inspector, names[0], checkpoints, cards)
        empty = inspection_of(inspector, Findings({}, ()), recipe, clock.seconds())
        return replace(empty, teachers=compared.teachers, checkpoints=compared.ranks, notes=compared.notes)


def _which(names: Sequence[str]) -> tuple[str, str]:
    cause = f"the recipe has the teachers {joined(names, 'and')}, and the checkpoints are of one"
    return cause, "say which one they replace with --teacher NAME"


def inspect_run(folder: Path, *, prompts: int | None = None, console: Console) -> Contribution:
    """Measure what a finished run changed in its student, on a sample of its prompts.

    `prompts` replaces `inspect.prompts` of the recipe. Progress is shown on `console`.

    Raises StorageError for a folder that is no finished run, RecipeError for a base or prompts that cannot be
    read.
    """
    clock = Clock()
    with ExitStack() as opened:
        reporter: AbstractContextManager[Reporter] = console_reporter(console)
        display = opened.enter_context(reporter)
        announce = announcer(display)
        announce(f"reading {shown(folder)}")
        run = open_run(folder, announce)
        announce("importing torch and transformers")
        from mergeopd.engine.models import Machine
        from mergeopd.engine.stages import Stages
        from mergeopd.inspection.contribution import open_students
        from mergeopd.inspection.contribution_records import contribution_of
        from mergeopd.models.causal import pick_device

        quiet_libraries()
        machine = Machine(pick_device(), SingleProcess())
        stages = Stages(display, clock, machine.ranks, None)
        students = opened.enter_context(open_students(run, prompts, machine, stages))
        measured = students.run()
        return contribution_of(run, students, measured, clock.seconds())


def _chosen(recipe: Path, inputs: Inputs, teachers: Sequence[str]) -> list[str]:
    known = list(inputs.plan.teachers)
    unknown = [
        option_problem(
            "--teacher",
            f"unknown teacher '{name}'",
            did_you_mean(name, known, f"the recipe has {joined(known, 'and')}"),
        )
        for name in teachers
        if name not in known
    ]
    if unknown:
        raise RecipeError(unknown)
    chosen = [name for name in known if not teachers or name in teachers]
    idle = [name for name in chosen if not Pair.of(inputs, name).prompts]
    if idle == chosen or (teachers and idle):
        cause = f"no prompt is routed to teacher {joined([repr(name) for name in idle], 'and')}"
        if not chosen:
            cause = "the recipe has no teacher to inspect"
        remedy = "give a source of `prompts` this teacher; documents have no prompts"
        raise RecipeError([Problem(Location(shown(recipe)), "prompts", cause, remedy)])
    return chosen
