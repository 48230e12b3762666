"""`mergeopd inspect`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergeopd.cli.opening import open_with
from mergeopd.cli.options import JsonOption, SetOption
from mergeopd.distributed.rendezvous import RankInfo
from mergeopd.errors import ProcessError, RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from mergeopd.reporting.contribution import Contribution
    from mergeopd.reporting.inspection import Inspection

RunArgument = Annotated[
    Path,
    typer.Argument(metavar="RECIPE|RUN", help="The recipe, or a finished run's folder.", show_default=False),
]


def inspect(
    recipe: RunArgument,
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
            help="Folder for inspect.json and inspect.html (of a run: contribution.json and "
            "contribution.html); default: inspect in the run folder.",
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
    """Say what each teacher of a recipe could teach its student; of a run, what it changed.

    Compares vocabularies, templates and end tokens, lets the student and every teacher respond to a sample of
    the recipe's prompts, and compares their distributions. With the folder of a finished run, base and merged
    student respond to the same prompts: what each teacher changed, what was forgotten, what is left to learn.

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
    assert folder is not None  # else the recipe had mistakes
    _show(inspection, folder, console)


def _show(inspection: Inspection | Contribution, folder: Path, console: Console) -> None:
    from mergeopd.messages import shown
    from mergeopd.reporting.inspection import Inspection
    from mergeopd.reporting.terminal.contribution import ContributionTable
    from mergeopd.reporting.terminal.inspection import InspectionTable
    from mergeopd.storage import run_layout

    def paths(data: str, page: str) -> dict[str, Path]:
        return {"data": Path(shown(folder / data)), "page": Path(shown(folder / page))}

    if isinstance(inspection, Inspection):
        written = paths(run_layout.INSPECTION_DATA, run_layout.INSPECTION_PAGE)
        console.print(InspectionTable(inspection, written))
    else:
        written = paths(run_layout.CONTRIBUTION_DATA, run_layout.CONTRIBUTION_PAGE)
        console.print(ContributionTable(inspection, written))


def _folder(recipe: Path, overrides: Sequence[str]) -> Path | None:
    """Return the folder of an inspection in the run folder; None for a recipe with mistakes."""
    from mergeopd import api
    from mergeopd.storage import run_layout

    if recipe.is_dir():
        return recipe / run_layout.INSPECTION
    with suppress(RecipeError):  # the inspection reports all mistakes
        return Path(api.load(recipe, set=overrides).output) / run_layout.INSPECTION
    return None
