"""`mergeopd push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergeopd.cli.display import show_notes, waiting


def push(
    folder: Annotated[Path, typer.Argument(help="A finished run folder, or its export.", show_default=False)],
    to: Annotated[str, typer.Option(metavar="USER/NAME", help="Repository to create.", show_default=False)],
    private: Annotated[
        bool, typer.Option("--private/--public", help="Visibility of a new repository.")
    ] = True,
    revision: Annotated[
        str | None,
        typer.Option(metavar="BRANCH", help="Branch to commit to; allows a repository that exists already."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files and their sizes, and send nothing.")
    ] = False,
) -> None:
    """Upload an exported student with its model card to the Hugging Face hub.

    The token is that of HF_TOKEN or of `hf auth login`.

    Example: mergeopd push runs/quickstart --to me/quickstart --dry-run
    """
    from rich.filesize import decimal

    from mergeopd.reporting import hub

    upload = hub.prepare(folder, to, private=private, revision=revision)
    for name, size in upload.files.items():
        typer.echo(f"{decimal(size):>10}  {name}")
    where = f"{to}, {f'branch {revision}' if revision else 'private' if private else 'public'}"
    typer.echo(f"{decimal(sum(upload.files.values())):>10}  in all, to {where}")
    show_notes(upload.notes)
    if dry_run:
        typer.echo("Nothing was sent.")
        return
    with waiting(f"Uploading to {to}"):
        url = hub.push(upload)
    typer.echo(url)
