"""`mergeopd schema`."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def schema(
    card: Annotated[bool, typer.Option("--card", help="Print the schema of teacher cards instead.")] = False,
) -> None:
    """Print the JSON Schema of recipes, for editors.

    Example: mergeopd schema > recipe.schema.json
    """
    from mergeopd.recipe.jsonschema import card_schema, recipe_schema

    typer.echo(json.dumps(card_schema() if card else recipe_schema(), indent=2))
