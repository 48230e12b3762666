"""`mergeopd run`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mergeopd.cli.errors import one_process_reports
from mergeopd.cli.opening import open_with
from mergeopd.cli.options import RecipeArgument, SetOption
from mergeopd.distributed.rendezvous import LAUNCHER, RankInfo
from mergeopd.errors import ProcessError, Stopped

if TYPE_CHECKING:
    from mergeopd.recipe.controls import Control
    from mergeopd.reporting.run_result import RunResult


UpdatesOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Stop after N more updates, e.g. for a smoke run."),
]
AllowChangeOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY",
        help="Resume although this key of the plan, or file, has changed since the run began. Repeatable.",
    ),
]
FreshOption = Annotated[
    bool,
    typer.Option(
        "--fresh",
        help="Start over; a run in the output folder is kept, in FOLDER.1 or the next free number.",
    ),
]
ControlOption = Annotated[
    Literal["sft", "sampled"] | None,  # `Control`, without the import of the recipe's schema
    typer.Option(
        help="Run a control instead, in controls/ of the run folder, and compare the run with it: sft: "
        "fine-tuning on the teachers' text; sampled: sampled reverse KL.",
    ),
]
ProcessesOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Start N processes on this machine, for student.parallel."),
]


def run(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    updates: UpdatesOption = None,
    allow_change: AllowChangeOption = None,
    fresh: FreshOption = False,
    control: ControlOption = None,
    nproc: ProcessesOption = None,
) -> None:
    """Run a merge, or resume it. Ctrl-C saves a checkpoint and stops; run the same command to resume.

    Example: mergeopd run recipes/quickstart.yaml --set optimizer.lr=1e-3
    """
    if fresh and allow_change:
        raise typer.BadParameter("--fresh starts over, so nothing is resumed; leave out --allow-change")
    place = RankInfo.of()
    with one_process_reports(place):
        if nproc is not None and place.world > 1:
            raise ProcessError(
                f"--nproc {nproc} in {place.name}; leave it out where torchrun starts processes"
            )
        settings: dict[str, Any] = {
            "set": overrides or (),
            "updates": updates,
            "allow_change": allow_change or (),
            "fresh": fresh,
            "control": control,
        }
        try:
            if nproc is not None and nproc > 1:
                clear = open_with(recipe)
                try:
                    from mergeopd import api

                    code = api.launch(recipe, nproc, **settings)
                finally:
                    clear()
                raise typer.Exit(code)
            result = _run(recipe, settings, place)
        except KeyboardInterrupt:
            if place.rank == 0:
                typer.echo(f"Interrupted. {_what_is_kept(recipe, overrides or (), control)}", err=True)
            raise typer.Exit(130) from None
        if not result.is_finished:
            raise Stopped(
                f"stopped by --updates after {result.num_updates} of {result.planned_updates} updates, "
                "all saved; run the same command to resume"
            )


def _run(recipe: Path, settings: Mapping[str, Any], place: RankInfo) -> RunResult:
    """Run with progress on stdout."""
    # In a pipe, the launcher has printed its line.
    clear = open_with(recipe, only_terminal=LAUNCHER in os.environ) if place.rank == 0 else lambda: None
    try:
        from rich.console import Console

        from mergeopd import api

        return api.run(recipe, **settings, on_event=lambda _: clear(), console=Console())
    finally:
        clear()


def _what_is_kept(recipe: Path, overrides: Sequence[str], control: Control | None) -> str:
    """Say what a run that was interrupted at once resumes from."""
    with suppress(Exception):  # the recipe may be the reason why nothing has begun
        from mergeopd import api
        from mergeopd.recipe.controls import control_plan
        from mergeopd.storage.folders import newest_number
        from mergeopd.storage.run_folder import RunFolder

        plan = api.load(recipe, set=overrides)
        folder = RunFolder(Path((plan if control is None else control_plan(plan, control)).output))
        if folder.export.exists():
            return "Training and export are saved; run the same command to evaluate."
        if number := newest_number(folder.checkpoints):
            return f"Run the same command to resume from the newest checkpoint, of update {number}."
    return "There is no checkpoint yet; run the same command to start again."
