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
    runs: Annotated[
        list[Path],
        typer.Argument(help="The run folder, a recipe's `output`; several are compared.", show_default=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="The page; default: report.html in the run folder, comparison.html here for several.",
            show_default=False,
        ),
    ] = None,
    show: Annotated[
        Open, typer.Option("--open", help="Open the page in the browser; auto: in a desktop terminal.")
    ] = Open.auto,
) -> None:
    """Rebuild a run folder's report.html: result, curves, responses, cost, recipe; or compare several runs.

    Example: mergeopd report runs/quickstart runs/other --open no
    """
    from mergeopd import api
    from mergeopd.messages import shown

    path, notes = api.report(*runs, output=output)
    show_notes(notes)
    typer.echo(shown(path))
    if show is Open.yes or (show is Open.auto and sys.stdout.isatty() and _has_desktop()):
        typer.launch(str(path))


def _has_desktop() -> bool:
    return sys.platform in ("darwin", "win32") or bool(os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"})
