"""`mergeopd targets`."""

from __future__ import annotations

from typing import Annotated

import typer

from mergeopd.cli.errors import one_process_reports
from mergeopd.cli.opening import open_with
from mergeopd.cli.options import RecipeArgument, SetOption
from mergeopd.distributed.rendezvous import RankInfo


def targets(
    recipe: RecipeArgument,
    teacher: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Write this teacher's targets only. Repeatable."),
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Write teachers' targets for a fixed text once, so that runs learn from them without the teachers.

    Writes those of teachers with `targets: FOLDER`. What a folder has already is kept; run the same command
    to resume.

    Example: mergeopd targets recipes/methods/recorded.yaml
    """
    place = RankInfo.of()
    with one_process_reports(place):
        clear = open_with(recipe) if place.rank == 0 else lambda: None
        try:
            from rich.console import Console

            from mergeopd import api

            console = Console()
            clear()
            manifests = api.record_targets(
                recipe, set=overrides or (), teachers=teacher or (), console=console
            )
        except KeyboardInterrupt:
            if place.rank == 0:
                typer.echo("Interrupted. Finished shards are kept; run the same command to resume.", err=True)
            raise typer.Exit(130) from None
        finally:
            clear()
    if place.rank == 0:
        for name, manifest in manifests.items():
            typer.echo(
                f"{name}: {manifest.num_sequences:,} responses, {manifest.num_tokens:,} tokens, "
                f"{manifest.num_bytes / 2**30:,.3f} GiB. `mergeopd run {recipe}` learns from them."
            )
