"""`mergeopd check`."""

from __future__ import annotations

import json

import typer

from mergeopd.cli.display import show_notes
from mergeopd.cli.options import JsonOption, RecipeArgument, SetOption
from mergeopd.errors import Problem, RecipeError


def check(recipe: RecipeArgument, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Find every mistake in a recipe and in the files that it names, without loading a model.

    Exit code 0: no mistake; 2: the recipe has mistakes.

    Example: mergeopd check recipes/quickstart.yaml
    """
    from mergeopd import api

    try:
        result = api.check(recipe, set=overrides or ())
    except RecipeError as error:
        if not as_json:
            raise
        typer.echo(json.dumps({"ok": False, "problems": [_as_json(p) for p in error.problems]}, indent=2))
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps({"ok": True, "plan": result.plan.hash, "notes": result.notes}, indent=2))
        return
    show_notes(result.notes)
    typer.echo(f"{recipe}: OK. {result}.")


def _as_json(problem: Problem) -> dict[str, str | int]:
    return {
        "file": problem.location.file,
        "line": problem.location.line,
        "column": problem.location.column,
        "path": problem.path,
        "message": problem.message,
        "remedy": problem.remedy,
    }
