"""Marks that a terminal can show: line art where the encoding is Unicode, ASCII otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich import box
from rich.console import ConsoleOptions


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
        """The set for a console."""
        return _ASCII if options.ascii_only else _UNICODE


_UNICODE = Glyphs(levels="▁▂▃▄▅▆▇█", block="━", dot="·", table_box=box.SIMPLE_HEAD, ascii_only=False)
_ASCII = Glyphs(levels="_.-=+*#@", block="=", dot="|", table_box=box.ASCII2, ascii_only=True)


def plain_text(text: str, glyphs: Glyphs) -> str:
    """`text` on one line, without characters that the terminal would act on or cannot encode."""
    line = "".join(char if char.isprintable() else " " for char in text)
    return line.encode("ascii", "replace").decode() if glyphs.ascii_only else line


def sparkline(values: Sequence[float], width: int, glyphs: Glyphs) -> str:
    """At most `width` marks from old to new, each the mean of a stretch, scaled to the range shown."""
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
