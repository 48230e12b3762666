"""Text, tables and histories for a terminal: line art if its encoding is Unicode, ASCII otherwise."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_WIDEST_SPARKLINE = 48


_LEVELS = "▁▂▃▄▅▆▇█"
_ASCII = str.maketrans(
    {**dict(zip(_LEVELS, "_.-=+*#@", strict=True)), "━": "=", "·": "|", "‖": "||"}
    | {"↓": "v", "↑": "^", "→": "->", "±": "+-"}
)


def plain_text(text: str, ascii_only: bool) -> str:
    """Return `text` on one line, without control characters and those that the terminal cannot encode."""
    line = "".join(char if char.isprintable() else " " for char in text)
    return line.translate(_ASCII).encode("ascii", "replace").decode() if ascii_only else line


def table(
    headings: Sequence[str], rows: Iterable[Sequence[str]] = (), *, ascii_only: bool, title: str | None = None
) -> Table:
    """Return a table of `rows`; columns after the first are aligned to the right."""
    result = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    result.header_style = "dim"
    for i, heading in enumerate(headings):
        result.add_column(plain_text(heading, ascii_only), justify="right" if i else "left", overflow="fold")
    for row in rows:
        result.add_row(*(plain_text(cell, ascii_only) for cell in row))
    return result


def sparkline(values: ArrayLike, width: int) -> str:
    """Draw at most `width` marks from old to new, each a mean of values, scaled to the range shown."""
    count = min(width, np.size(values))
    if count < 1:
        return ""
    means = np.array([part.mean() for part in np.array_split(np.asarray(values), count)])
    low, high = means.min(), means.max()
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        return _LEVELS[0] * count
    levels = np.rint((means - low) / (high - low) * (len(_LEVELS) - 1)).astype(int)
    return "".join(_LEVELS[level] for level in levels)


@dataclass(frozen=True, slots=True)
class Sparkline:
    """A history as wide as its table column allows."""

    values: array[float]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(_WIDEST_SPARKLINE, options.max_width)
        yield Text(plain_text(sparkline(self.values, width), options.ascii_only))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, min(_WIDEST_SPARKLINE, max(1, len(self.values))))
