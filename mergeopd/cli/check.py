"""`mergeopd check`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from mergeopd.cli.display import show_notes
from mergeopd.cli.opening import open_with
from mergeopd.cli.options import JsonOption, RecipeArgument, SetOption
from mergeopd.errors import RecipeError
from mergeopd.messages import joined

if TYPE_CHECKING:
    from mergeopd.preflight.summary import SourceSummary


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
        sources = {name: asdict(source) for name, source in result.sources.items()}
        document = {"ok": True, "plan": result.plan.hash, "notes": result.notes, "sources": sources}
        typer.echo(json.dumps(document, indent=2))
        return
    show_notes(result.notes)
    for line in _sources(result.sources):
        typer.echo(line)
    typer.echo(f"{recipe}: OK. {result}.")


def _sources(sources: Mapping[str, SourceSummary]) -> Iterator[str]:
    """Yield a line per file of training prompts, in columns."""
    rows = [
        (
            source.domain,
            name,
            f"{source.num_prompts:,} prompts",
            f"drawn {_short(source.passes)} times",
            joined([f"{t} {w:g}" if w != 1.0 else t for t, w in source.teachers.items()], "and")
            or "no teacher",
        )
        for name, source in sources.items()
    ]
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    for *cells, teachers in rows:
        start = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        yield f"  {start}  by {teachers}"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
