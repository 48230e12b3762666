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
    contribution: Annotated[
        bool, typer.Option("--contribution", help="Print the schema of contribution.json instead.")
    ] = False,
) -> None:
    """Print the JSON Schema of recipes, for editors.

    Example: mergeopd schema > recipe.schema.json
    """
    from mergeopd.recipe.jsonschema import card_schema, recipe_schema
    from mergeopd.reporting.contribution import contribution_schema
    from mergeopd.reporting.inspection import inspection_schema

    if card + inspect + contribution > 1:
        raise typer.BadParameter("choose one of --card, --inspect and --contribution")
    others = {card_schema: card, inspection_schema: inspect, contribution_schema: contribution}
    schema = next((make for make, is_chosen in others.items() if is_chosen), recipe_schema)
    typer.echo(json.dumps(schema(), indent=2))
