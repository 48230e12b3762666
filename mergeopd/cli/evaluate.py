"""`mergeopd eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergeopd.cli.errors import one_process_reports
from mergeopd.cli.opening import open_with
from mergeopd.cli.options import RecipeArgument, SetOption
from mergeopd.distributed.rendezvous import RankInfo


def evaluate(
    recipe: RecipeArgument,
    model: Annotated[
        Path | None,
        typer.Option(help="Hugging Face folder to measure as the merged student; default: the run's export."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Load this model only: merged, base, expert/NAME or merge/KIND. Repeatable. "
            "Others are compared with if their responses are kept."
        ),
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Measure base, experts, static merges and a merged student on the recipe's evaluation prompts.

    Example: mergeopd eval recipes/quickstart.yaml --model runs/quickstart/export
    """
    place = RankInfo.of()
    with one_process_reports(place):
        clear = open_with(recipe) if place.rank == 0 else lambda: None
        try:
            from rich.console import Console

            from mergeopd import api

            console = Console()
            clear()
            api.evaluate(
                recipe, set=overrides or (), model=model, output=output, only=only or (), console=console
            )
        except KeyboardInterrupt:
            if place.world == 1:
                raise
            raise typer.Exit(130) from None
        finally:
            clear()
