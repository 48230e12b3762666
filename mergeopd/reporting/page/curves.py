"""Charts of a run: quantities, series and numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from mergeopd.reporting.figures import (
    DOMAIN_FIGURES,
    MEASURE_FIGURES,
    RUN_FIGURES,
    SECONDS,
    STAGES,
    TEACHER_FIGURES,
    Figure,
    run_value,
)
from mergeopd.reporting.jsonl import UpdateRecord

MAX_POINTS = 1500
"""Longer runs are shown as means over equal numbers of updates."""
ACCENT = -1
"""The colour of a chart's only line."""
# Stages of every round; those that run once per run or phase would dwarf them.
_REPEATED_STAGES = ("rollout", "teachers", "update", "checkpoint")

Group = Literal["teachers", "domains", "run"]
Read = Callable[[UpdateRecord], float | None]


@dataclass(frozen=True, slots=True)
class Series:
    """One line. `colour` is an index into the page's palette; `values` has one number per point."""

    name: str
    colour: int
    values: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure with its lines; `id` is unique on the page."""

    group: Group
    figure: Figure
    series: tuple[Series, ...]

    @property
    def id(self) -> str:
        return f"{self.group}-{self.figure.key}"


@dataclass(frozen=True, slots=True)
class Curves:
    """All charts over the same `updates`; each point is the mean of `stretch` of them.

    `phases` are (name, first update).
    """

    updates: tuple[int, ...]
    phases: tuple[tuple[str, int], ...]
    charts: tuple[Chart, ...]
    stretch: int

    def in_group(self, group: Group) -> tuple[Chart, ...]:
        return tuple(chart for chart in self.charts if chart.group == group)

    def document(self) -> dict[str, Any]:
        return {
            "updates": self.updates,
            "phases": self.phases,
            "charts": {
                chart.id: {
                    "unit": chart.figure.unit,
                    "stacked": chart.figure.stacked,
                    "steady": chart.figure.steady,
                    "series": [
                        {"name": s.name, "colour": s.colour, "values": s.values} for s in chart.series
                    ],
                }
                for chart in self.charts
            },
        }


def build_curves(updates: Sequence[UpdateRecord], max_points: int = MAX_POINTS) -> Curves:
    """Build the charts of all figures in the updates, without those that are constant by design.

    Numbers are those of metrics.jsonl (fractions in %) up to `max_points` updates. In longer runs, each point
    is the mean of the known numbers of several updates, at the last of them.
    """
    stretch = max(1, -(-len(updates) // max_points))
    stretches = [updates[i : i + stretch] for i in range(0, len(updates), stretch)]
    charts = []
    for group, figure, lines in _candidates(updates):
        if not any(figure.is_informative(read(update)) for _, _, read in lines for update in updates):
            continue
        factor = 100.0 if figure.unit == "%" else 1.0
        series = [
            Series(name, colour, tuple(_mean(part, read, factor) for part in stretches))
            for name, colour, read in lines
        ]
        charts.append(Chart(group, figure, tuple(s for s in series if set(s.values) != {None})))
    starts = [u for i, u in enumerate(updates) if i == 0 or updates[i - 1].phase != u.phase]
    return Curves(
        updates=tuple(part[-1].update for part in stretches),
        phases=tuple((update.phase, update.update) for update in starts),
        charts=tuple(charts),
        stretch=stretch,
    )


def _candidates(
    updates: Sequence[UpdateRecord],
) -> Iterator[tuple[Group, Figure, list[tuple[str, int, Read]]]]:
    """Yield every possible chart: its group, its figure, and name, colour and value of each line."""
    teachers = sorted({name for update in updates for name in update.teachers})
    domains = sorted({name for update in updates for name in update.domains})
    # A teacher and a domain of the same name have the same colour.
    colours = {name: index for index, name in enumerate(sorted({*teachers, *domains}))}

    def lines(group: str, names: Sequence[str], key: str) -> list[tuple[str, int, Read]]:
        return [(name, colours[name], partial(_of_part, group=group, name=name, key=key)) for name in names]

    for figure in (*MEASURE_FIGURES.values(), *TEACHER_FIGURES):
        yield "teachers", figure, lines("teachers", teachers, figure.key)
    for figure in DOMAIN_FIGURES:
        yield "domains", figure, lines("domains", domains, figure.key)
    for figure in RUN_FIGURES:
        yield "run", figure, [(figure.title.lower(), ACCENT, partial(run_value, key=figure.key))]
    stages = [name for name in _REPEATED_STAGES if any(name in update.cost.seconds for update in updates)]
    yield "run", SECONDS, [(name, STAGES[name][0], partial(_of_stage, name=name)) for name in stages]


def _of_part(update: UpdateRecord, group: str, name: str, key: str) -> float | None:
    parts: Mapping[str, Mapping[str, float | None]] = getattr(update, group)
    return parts[name].get(key) if name in parts else None


def _of_stage(update: UpdateRecord, name: str) -> float | None:
    return update.cost.seconds.get(name)


def _mean(part: Sequence[UpdateRecord], read: Read, factor: float) -> float | None:
    known = [value for update in part if (value := read(update)) is not None]
    return factor * (sum(known) / len(known)) if known else None
