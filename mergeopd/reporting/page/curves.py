"""Charts of a run: quantities, series and numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mergeopd.reporting import figures
from mergeopd.reporting.figures import Figure
from mergeopd.reporting.jsonl import Numbers, UpdateRecord

MAX_POINTS = 1500
"""Longer runs are shown as means over equal numbers of updates."""
ACCENT = -1
"""The colour of a chart's only line."""
# Stages of every round; those that run once per run or phase would dwarf them.
_REPEATED_STAGES = ("rollout", "teachers", "update", "checkpoint")

Group = Literal["teachers", "domains", "run"]


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
        charts = {c.id: {**asdict(c.figure), "series": [asdict(s) for s in c.series]} for c in self.charts}
        return {"updates": self.updates, "phases": self.phases, "charts": charts}


def build_curves(updates: Sequence[UpdateRecord], max_points: int = MAX_POINTS) -> Curves:
    """Build the charts of all figures in the updates, without those that are constant by design.

    Numbers are those of metrics.jsonl (fractions in %) up to `max_points` updates. In longer runs, each point
    is the mean of the known numbers of several updates, at the last of them.
    """
    stretch = max(1, -(-len(updates) // max_points))
    charts = []
    for group, figure, lines in _candidates(updates):
        if any(figure.is_informative(value) for line in lines for value in line.values):
            factor = 100.0 if figure.unit == "%" else 1.0
            series = (replace(line, values=_means(line.values, stretch, factor)) for line in lines)
            charts.append(Chart(group, figure, tuple(s for s in series if set(s.values) != {None})))
    starts = [u for i, u in enumerate(updates) if i == 0 or updates[i - 1].phase != u.phase]
    return Curves(
        updates=tuple(updates[i : i + stretch][-1].update for i in range(0, len(updates), stretch)),
        phases=tuple((update.phase, update.update) for update in starts),
        charts=tuple(charts),
        stretch=stretch,
    )


def _candidates(updates: Sequence[UpdateRecord]) -> Iterator[tuple[Group, Figure, list[Series]]]:
    """Yield every possible chart: its group, its figure, and its lines with a value per update."""
    teachers = sorted({name for update in updates for name in update.teachers})
    domains = sorted({name for update in updates for name in update.domains})
    # A teacher and a domain of the same name have the same colour.
    colours = {name: index for index, name in enumerate(sorted({*teachers, *domains}))}

    def lines(group: str, names: Sequence[str], key: str) -> list[Series]:
        parts: list[Mapping[str, Numbers]] = [getattr(update, group) for update in updates]
        return [
            Series(name, colours[name], tuple(part.get(name, {}).get(key) for part in parts))
            for name in names
        ]

    for figure in (*figures.MEASURE_FIGURES.values(), *figures.TEACHER_FIGURES):
        yield "teachers", figure, lines("teachers", teachers, figure.key)
    for figure in figures.DOMAIN_FIGURES:
        yield "domains", figure, lines("domains", domains, figure.key)
    for figure in figures.RUN_FIGURES:
        values = tuple(figures.run_value(update, figure.key) for update in updates)
        yield "run", figure, [Series(figure.title.lower(), ACCENT, values)]
    seconds = [update.cost.seconds for update in updates]
    yield (
        "run",
        figures.SECONDS,
        [
            Series(stage, figures.STAGES[stage][0], tuple(of_update.get(stage) for of_update in seconds))
            for stage in _REPEATED_STAGES
        ],
    )


def _means(values: Sequence[float | None], stretch: int, factor: float) -> tuple[float | None, ...]:
    parts = (values[i : i + stretch] for i in range(0, len(values), stretch))
    known = ([value for value in part if value is not None] for part in parts)
    return tuple(factor * (sum(part) / len(part)) if part else None for part in known)
