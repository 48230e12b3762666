"""`mergeopd report`."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mergeopd.cli.display import show_notes


class Open(StrEnum):
    """Whether to open a page in the browser; `auto`: if the command runs in a desktop terminal."""

    auto = "auto"
    yes = "yes"
    no = "no"


def report(
    run: Annotated[Path, typer.Argument(help="The run folder: a recipe's `output`.", show_default=False)],
    show: Annotated[
        Open, typer.Option("--open", help="Open the page in the browser; auto: in a desktop terminal.")
    ] = Open.auto,
) -> None:
    """Rebuild a run folder's report.html: result, curves, sampled responses, time, recipe.

    Example: mergeopd report runs/quickstart --open no
    """
    from mergeopd import api
    from mergeopd.messages import shown

    path, notes = api.report(run)
    show_notes(notes)
    typer.echo(shown(path))
    if show is Open.yes or (show is Open.auto and sys.stdout.isatty() and _has_desktop()):
        typer.launch(str(path))


def _has_desktop() -> bool:
    return sys.platform in ("darwin", "win32") or bool(os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"})
