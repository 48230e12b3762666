"""A line that appears before the imports of a command, which take seconds."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import IO

from mergeopd import __version__
from mergeopd.errors import printable

_CLEAR = "\r\x1b[2K"


def open_with(
    recipe: Path, stream: IO[str] | None = None, *, only_terminal: bool = False
) -> Callable[[], None]:
    """Print which recipe is being read, and return a function that clears this from a terminal.

    Pipes get a line, unless `only_terminal` is set. `stream` is stdout if not given.
    """
    stream = sys.stdout if stream is None else stream
    name = printable(str(recipe)).replace("\n", " ")
    if not stream.isatty() or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        if not only_terminal:
            now = datetime.now()
            print(f"{now:%Y-%m-%d %H:%M:%S}  mergeopd {__version__}, {name}", file=stream, flush=True)
        return lambda: None
    is_open = True

    def clear() -> None:
        nonlocal is_open
        if is_open:
            stream.write(_CLEAR)
            stream.flush()
        is_open = False

    # The launcher of several processes may have begun this line.
    stream.write(_CLEAR + f"reading {name}"[: shutil.get_terminal_size().columns - 1])
    stream.flush()
    return clear
