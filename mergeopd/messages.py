"""Text helpers for messages: short paths, lists in words, problems of command-line options."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from mergeopd.errors import Location, Problem


def option_problem(option: str, message: str, remedy: str = "", path: str = "") -> Problem:
    """Create a problem that is located at a command-line option."""
    return Problem(Location(option), path, message, remedy)


def shown(file: Path) -> str:
    """Format a path for messages: relative to the current folder if it is below it."""
    try:
        return str(Path(os.path.abspath(file)).relative_to(os.getcwd()))
    except ValueError:
        return str(file)


def shown_in(text: str) -> str:
    """Shorten the paths below the current folder in a message, as `shown` does."""
    here = os.getcwd()
    if here == os.sep:
        return text
    return re.sub(rf"(?<![^\s'\"(\[]){re.escape(here + os.sep)}", "", text)


def joined(words: Sequence[str], last: str) -> str:
    """Join words: `a, b or c`."""
    return f" {last} ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
