"""`mergeopd tokenizers`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from mergeopd.cli.display import waiting
from mergeopd.cli.options import JsonOption

_LARGE_TEXT = 1 << 20  # bytes; longer texts show a spinner


def tokenizers(
    a: Annotated[str, typer.Argument(metavar="A", help="Tokenizer folder, or a hub id in the local cache.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other tokenizer.")],
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text in UTF-8 to compare on; default: a short sample."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two tokenizers: shared tokens, how they split a text, special tokens, chat templates.

    Example: mergeopd tokenizers experts/base experts/sort --text README.md
    """
    from rich.console import Console

    from mergeopd.inspection.tokenizers import compare_tokenizers

    large = text is not None and text.is_file() and text.stat().st_size > _LARGE_TEXT
    with waiting(f"Reading {text} with both") if large else nullcontext():
        pair = compare_tokenizers(a, b, text)
    if as_json:
        typer.echo(json.dumps(pair.document(), indent=2))
    else:
        Console().print(pair)
