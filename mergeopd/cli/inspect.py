"""`mergeopd inspect`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from mergeopd.cli.opening import open_with
from mergeopd.cli.options import JsonOption, RecipeArgument, SetOption
from mergeopd.distributed.rendezvous import RankInfo
from mergeopd.errors import ProcessError, RecipeError


def inspect(
    recipe: RecipeArgument,
    teacher: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Inspect this teacher only. Repeatable."),
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Prompts to sample; default: inspect.prompts of the recipe."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for inspect.json and inspect.html; default: inspect in the run folder.",
            show_default=False,
        ),
    ] = None,
    gradients: Annotated[
        bool,
        typer.Option(
            "--gradients",
            help="Also compare the teachers' gradients with that of the student's success, which needs "
            "many more responses.",
        ),
    ] = False,
    checkpoints: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Compare this model folder, or all in this folder, in the place of the teacher, and write "
            "cards of the best. Repeatable.",
        ),
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what each teacher of a recipe could teach its student, before training.

    Compares vocabularies, templates and end tokens, lets the student and every teacher respond to a sample of
    the recipe's prompts, and compares their distributions.

    Example: mergeopd inspect recipes/quickstart.yaml --teacher sort
    """
    place = RankInfo.of()
    if place.world > 1:
        raise ProcessError(f"{place.name}: an inspection runs in one process; start it without torchrun")
    stream = sys.stderr if as_json else sys.stdout
    clear = open_with(recipe, stream, only_terminal=as_json)
    try:
        from rich.console import Console

        from mergeopd import api

        console = Console(stderr=as_json)
        folder = _folder(recipe, overrides or ()) if out is None else out
        clear()
        inspection = api.inspect(
            recipe,
            set=overrides or (),
            teachers=teacher or (),
            prompts=prompts,
            gradients=gradients,
            checkpoints=checkpoints or (),
            output=folder,
            console=console,
        )
    except KeyboardInterrupt:
        typer.echo("Interrupted. Nothing was written.", err=True)
        raise typer.Exit(130) from None
    finally:
        clear()
    if as_json:
        from mergeopd.storage.metrics import json_text

        typer.echo(json_text(inspection.document(), indent=2))
        return
    from mergeopd.messages import shown
    from mergeopd.reporting.terminal.inspection import InspectionTable

    written = {} if folder is None else {"data": "inspect.json", "page": "inspect.html"}
    paths = {label: Path(shown(folder / name)) for label, name in written.items()} if folder else {}
    console.print(InspectionTable(inspection, paths))


def _folder(recipe: Path, overrides: Sequence[str]) -> Path | None:
    """Return the folder of an inspection in the run folder; None for a recipe with mistakes."""
    from mergeopd import api
    from mergeopd.storage import run_layout

    with suppress(RecipeError):  # the inspection reports all mistakes
        return Path(api.load(recipe, set=overrides).output) / run_layout.INSPECTION
    return None
