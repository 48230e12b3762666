"""`mergeopd check`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import typer

from mergeopd.cli.display import show_notes
from mergeopd.cli.opening import open_with
from mergeopd.cli.options import JsonOption, RecipeArgument, SetOption
from mergeopd.errors import RecipeError


def check(recipe: RecipeArgument, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Find every mistake in a recipe and in the files that it names, without loading a model.

    Exit code 0: no mistake; 2: the recipe has mistakes.

    Example: mergeopd check recipes/quickstart.yaml
    """
    clear = open_with(recipe, sys.stderr, only_terminal=True)
    try:
        from mergeopd import api

        result = api.check(recipe, set=overrides or ())
    except RecipeError as error:
        if not as_json:
            raise
        problems = [
            {**asdict(p.location), "path": p.path, "message": p.message, "remedy": p.remedy}
            for p in error.problems
        ]
        typer.echo(json.dumps({"ok": False, "problems": problems}, indent=2))
        raise typer.Exit(2) from None
    finally:
        clear()
    if as_json:
        typer.echo(json.dumps({"ok": True, "plan": result.plan.hash, "notes": result.notes}, indent=2))
        return
    show_notes(result.notes)
    typer.echo(f"{recipe}: OK. {result}.")
