"""`mergeopd schema`."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def schema(
    card: Annotated[bool, typer.Option("--card", help="Print the schema of teacher cards instead.")] = False,
    inspect: Annotated[
        bool, typer.Option("--inspect", help="Print the schema of inspect.json instead.")
    ] = False,
) -> None:
    """Print the JSON Schema of recipes, for editors.

    Example: mergeopd schema > recipe.schema.json
    """
    from mergeopd.recipe.jsonschema import card_schema, recipe_schema
    from mergeopd.reporting.inspection import inspection_schema

    if card and inspect:
        raise typer.BadParameter("choose one of --card and --inspect")
    schema = card_schema if card else inspection_schema if inspect else recipe_schema
    typer.echo(json.dumps(schema(), indent=2))
