"""Durations, and the wall time by stage on one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate, pairwise

from rich.text import Text

from mergeopd.reporting.figures import STAGES


def clock_text(seconds: float) -> str:
    """`0:07`, `12:34`, `1:02:03`, `2d 03:04`."""
    if not math.isfinite(seconds):
        return "-"
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def shares(seconds: Mapping[str, float]) -> dict[str, int]:
    """Return whole percentages that add up to 100 (largest remainders); empty without time."""
    total = sum(seconds.values())
    if not total > 0:
        return {}
    exact = {name: 100 * value / total for name, value in seconds.items()}
    result = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: result[name] - exact[name])
    for name in by_remainder[: 100 - sum(result.values())]:
        result[name] += 1
    return result


def split_line(
    seconds: Mapping[str, float], width: int, *, ascii_only: bool, total: bool = False
) -> Text | None:
    """Draw a coloured bar and its legend on one line of at most `width` cells; None without time.

    Stages below half a per cent are left out; if the line is too short, the smallest ones are combined as
    `other`.
    """
    parts = {name: percent for name, percent in shares(seconds).items() if percent}
    if not parts:
        return None
    line = Text.assemble((f"{'time':<8}", "dim"), no_wrap=True)
    if total:
        line.append(f"{clock_text(sum(seconds.values()))}  ")
    while len(line) + len(legend := _legend(parts)) > width and len(parts) > 2:
        *_, second, last = sorted(parts, key=lambda name: (name == "other", -parts[name]))
        parts["other"] = parts.pop(second) + parts.pop(last)
    room = min(40, width - len(line) - len(legend))
    if room >= 8:
        edges = [round(percent * room / 100) for percent in accumulate(parts.values(), initial=0)]
        for name, (start, end) in zip(parts, pairwise(edges), strict=True):
            line.append(("=" if ascii_only else "━") * (end - start), style=_style(name))
    else:  # no room: the legend has the same numbers
        legend = legend[2:]
    line.append_text(legend)
    line.truncate(width)
    return line


def _legend(parts: Mapping[str, int]) -> Text:
    stages = (Text.assemble((f"  {name}", _style(name)), f" {part}%") for name, part in parts.items())
    return Text().join(stages)


def _style(stage: str) -> str:
    return STAGES.get(stage, STAGES["other"])[1]
