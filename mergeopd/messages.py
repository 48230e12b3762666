"""Text helpers for messages: paths as people know them, lists in words, problems of command-line options."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from mergeopd.errors import Location, Problem


def option_problem(option: str, message: str, remedy: str = "", path: str = "") -> Problem:
    """A mistake on the command line, shown like one in a file."""
    return Problem(Location(option), path, message, remedy)


def shown(file: Path) -> str:
    """A file as messages name it: relative to the current folder when it is below it."""
    try:
        return str(Path(os.path.abspath(file)).relative_to(os.getcwd()))
    except ValueError:
        return str(file)


def shown_in(text: str) -> str:
    """A message in which the files below the current folder are shown as `shown` does."""
    here = os.getcwd()
    if here == os.sep:
        return text
    return re.sub(rf"(?<![^\s'\"(\[]){re.escape(here + os.sep)}", "", text)


def joined(words: Sequence[str], last: str) -> str:
    """`a, b or c`."""
    return f" {last} ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
