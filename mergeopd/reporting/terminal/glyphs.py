"""Characters for drawing in a terminal: line art if the encoding is Unicode, ASCII otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_WIDEST_SPARKLINE = 48


@dataclass(frozen=True, slots=True)
class Glyphs:
    """One set of marks. `levels` go from low to high."""

    levels: str
    block: str
    dot: str
    table_box: box.Box
    ascii_only: bool

    @staticmethod
    def of(options: ConsoleOptions) -> Glyphs:
        return _ASCII if options.ascii_only else _UNICODE

    def table(self, title: str) -> Table:
        return Table(
            title=plain_text(title, self) or None,
            title_justify="left",
            title_style="bold",
            box=self.table_box,
            header_style="dim",
            pad_edge=False,
        )


_UNICODE = Glyphs(levels="▁▂▃▄▅▆▇█", block="━", dot="·", table_box=box.SIMPLE_HEAD, ascii_only=False)
_ASCII = Glyphs(levels="_.-=+*#@", block="=", dot="|", table_box=box.ASCII2, ascii_only=True)


def plain_text(text: str, glyphs: Glyphs) -> str:
    """Return `text` on one line, without control characters and those that the terminal cannot encode."""
    line = "".join(char if char.isprintable() else " " for char in text)
    return line.replace("‖", "||").encode("ascii", "replace").decode() if glyphs.ascii_only else line


def sparkline(values: Sequence[float], width: int, glyphs: Glyphs) -> str:
    """Draw at most `width` marks from old to new, each a mean of values, scaled to the range shown."""
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        return glyphs.levels[0] * count
    top = len(glyphs.levels) - 1
    return "".join(glyphs.levels[round((mean - low) / (high - low) * top)] for mean in means)


@dataclass(frozen=True, slots=True)
class Sparkline:
    """A history as wide as its table column allows."""

    values: Sequence[float]
    glyphs: Glyphs

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(sparkline(self.values, min(_WIDEST_SPARKLINE, options.max_width), self.glyphs))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, min(_WIDEST_SPARKLINE, max(1, len(self.values))))
