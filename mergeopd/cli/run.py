"""`mergeopd run`."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergeopd.cli.errors import one_process_reports
from mergeopd.cli.options import RecipeArgument, SetOption
from mergeopd.distributed.rendezvous import RankInfo
from mergeopd.errors import ProcessError, Stopped

if TYPE_CHECKING:
    from mergeopd.api import RunResult


class ControlName(StrEnum):
    """The controls of a recipe."""

    sft = "sft"
    sampled = "sampled"


def run(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    updates: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Stop after N more updates, e.g. for a smoke run."),
    ] = None,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Resume although this key of the plan, or file, has changed since the run began. "
            "Repeatable.",
        ),
    ] = None,
    control: Annotated[
        ControlName | None,
        typer.Option(
            help="Run a control instead, in controls/ of the run folder, and compare the run with it: sft: "
            "fine-tuning on the teachers' text; sampled: sampled reverse KL.",
        ),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Start N processes on this machine, for student.parallel."),
    ] = None,
) -> None:
    """Run a merge, or resume it. Ctrl-C saves a checkpoint and stops; run the same command to resume.

    Example: mergeopd run recipes/quickstart.yaml --set optimizer.lr=1e-3
    """
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
            "control": None if control is None else control.value,
        }
        try:
            if nproc is not None and nproc > 1:
                from mergeopd import api

                raise typer.Exit(api.launch(recipe, nproc, **settings))
            result = _run(recipe, settings, place)
        except KeyboardInterrupt:
            if place.rank == 0:
                typer.echo(
                    "Interrupted. Run the same command to resume from the newest checkpoint.", err=True
                )
            raise typer.Exit(130) from None
        if not result.is_finished:
            raise Stopped(
                f"stopped by --updates after {result.num_updates} of {result.planned_updates} updates, "
                "all saved; run the same command to resume"
            )


def _run(recipe: Path, settings: Mapping[str, Any], place: RankInfo) -> RunResult:
    """Run with progress on stdout; a terminal shows a spinner until the run's first event."""
    from rich.console import Console

    console = Console()
    status = console.status("Reading the recipe and the models that it names")
    if place.rank == 0 and console.is_terminal and not console.is_dumb_terminal:
        status.start()  # before the import of torch, which takes seconds
    try:
        from mergeopd import api

        return api.run(recipe, **settings, on_event=lambda _: status.stop(), console=console)
    finally:
        status.stop()
