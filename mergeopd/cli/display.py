"""Output of commands besides their results: notes, and a spinner for slow work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer

from mergeopd.errors import MAX_SHOWN, printable


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show a spinner with a clock on a terminal, one line elsewhere, both on stderr, while slow work runs."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        typer.echo(f"{text} ...", err=True)
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(text, total=None)
        yield


def show_notes(notes: Sequence[str]) -> None:
    """Print notes with control characters escaped, at most `MAX_SHOWN` of them."""
    for note in notes[:MAX_SHOWN]:
        typer.echo(f"note: {printable(note)}")
    if len(notes) > MAX_SHOWN:
        typer.echo(f"note: ... and {len(notes) - MAX_SHOWN:,} more notes")
