"""Charts of a run: quantities, series and numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mergeopd.reporting import figures
from mergeopd.reporting.events import AccuracyMeasured
from mergeopd.reporting.figures import Figure
from mergeopd.reporting.jsonl import Numbers, UpdateRecord
from mergeopd.reporting.result import Estimate, Result

MAX_POINTS = 1500
"""Longer runs are shown as means over equal numbers of updates."""
ACCENT, SOFT, GOOD = -1, -2, -3
"""Colours outside the palette: of a chart's only line, of a base, of an expert."""
# Stages of every round; those that run once per run or phase would dwarf them.
_REPEATED_STAGES = ("rollout", "teachers", "update", "checkpoint")
_DECADE = 10.0

Group = Literal["accuracy", "teachers", "domains", "run"]


@dataclass(frozen=True, slots=True)
class Series:
    """One line, point or level of a chart.

    `colour` is an index into the page's palette, or one of the constants. `values` has one number per entry
    of `x`, by default the page's updates; `low` and `high` bound it. A `level` is one number for all updates.
    """

    name: str
    colour: int
    values: tuple[float | None, ...]
    x: tuple[int, ...] | None = None
    low: tuple[float | None, ...] | None = None
    high: tuple[float | None, ...] | None = None
    kind: Literal["line", "point", "level"] = "line"


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure with its series; `id` is unique on the page.

    `span` are the first and the last update to show, None for all; `phases` the names of phases that alone
    have this figure. `is_log`: the vertical axis is logarithmic.
    """

    group: Group
    figure: Figure
    series: tuple[Series, ...]
    span: tuple[int, int] | None = None
    phases: tuple[str, ...] = ()
    is_log: bool = False

    @property
    def id(self) -> str:
        return f"{self.group}-{self.figure.key}"

    def document(self) -> dict[str, Any]:
        """Return the chart for the page's script."""
        series = [{k: v for k, v in asdict(one).items() if v is not None} for one in self.series]
        return {**asdict(self.figure), "series": series, "span": self.span, "is_log": self.is_log}


@dataclass(frozen=True, slots=True)
class Curves:
    """All charts over the same `updates`; each point is the mean of `stretch` of them.

    `phases` are (name, first update).
    """

    updates: tuple[int, ...]
    phases: tuple[tuple[str, int], ...]
    charts: tuple[Chart, ...]
    stretch: int = 1

    def in_group(self, group: Group) -> tuple[Chart, ...]:
        return tuple(chart for chart in self.charts if chart.group == group)

    def document(self) -> dict[str, Any]:
        """Return all charts for the page's script."""
        charts = {chart.id: chart.document() for chart in self.charts}
        return {"updates": self.updates, "phases": self.phases, "charts": charts}


def build_curves(
    updates: Sequence[UpdateRecord],
    accuracy: Sequence[AccuracyMeasured] = (),
    result: Result | None = None,
    max_points: int = MAX_POINTS,
) -> Curves:
    """Build the charts of all figures in the updates, without those that are constant by design.

    Numbers are those of metrics.jsonl (fractions in %) up to `max_points` updates. In longer runs, each point
    is the mean of the known numbers of several updates, at the last of them. Without measured accuracies the
    rewards of training prompts take their place.
    """
    stretch = max(1, -(-len(updates) // max_points))
    last = updates[-1].update if updates else 0
    charts = accuracy_charts(accuracy, result, last) if accuracy else []
    objectives: list[Chart] = []
    for group, figure, lines in _candidates(updates):
        if any(figure.is_informative(value) for line in lines for value in line.values):
            factor = 100.0 if figure.unit == "%" else 1.0
            series = (replace(line, values=means(line.values, stretch, factor)) for line in lines)
            shown = tuple(s for s in series if set(s.values) != {None})
            is_reward = figure.key == "reward" and not accuracy
            chart = Chart("accuracy" if is_reward else group, figure, shown)
            if figure.key in figures.MEASURES:
                objectives.append(_of_phases(chart, updates, lines))
            else:
                charts.append(chart)
    objectives.sort(key=lambda chart: chart.span or (0, 0))
    starts = [u for i, u in enumerate(updates) if i == 0 or updates[i - 1].phase != u.phase]
    return Curves(
        updates=tuple(updates[i : i + stretch][-1].update for i in range(0, len(updates), stretch)),
        phases=tuple((update.phase, update.update) for update in starts),
        charts=(*objectives, *charts),
        stretch=stretch,
    )


def accuracy_charts(
    measured: Sequence[AccuracyMeasured], result: Result | None, last_update: int
) -> list[Chart]:
    """Build a chart per suite: the student during the run, its final accuracy, base and expert as levels."""
    charts = []
    in_result = () if result is None else tuple(result.suites)
    for suite in dict.fromkeys((*(suite for one in measured for suite in one.accuracy), *in_result)):
        own = [one for one in measured if suite in one.accuracy]
        series = []
        if own:
            name = f"student, {own[-1].num_prompts[suite]:,} prompts"
            updates = tuple(one.update for one in own)
            series.append(_estimates(name, ACCENT, updates, [one.accuracy[suite] for one in own]))
        if result is not None and suite in result.suites:
            row, headline = result.suites[suite], result.headline(suite)
            final = headline["merged"]
            if final is not None:
                name = f"at the end, {row.num_prompts:,} prompts"
                series.append(replace(_estimates(name, ACCENT, (last_update,), [final]), kind="point"))
            levels = (("base", headline["base"], SOFT), ("expert", headline["expert"], GOOD))
            series += [
                Series(kind, colour, (100.0 * level.value,), kind="level")
                for kind, level, colour in levels
                if level is not None and level.value is not None
            ]
        charts.append(Chart("accuracy", Figure(suite, "", suite, unit="%", steady=True), tuple(series)))
    return charts


def _estimates(name: str, colour: int, x: tuple[int, ...], estimates: Sequence[Estimate]) -> Series:
    def scaled(values: Sequence[float | None]) -> tuple[float | None, ...]:
        return tuple(None if value is None else 100.0 * value for value in values)

    values, low, high = (scaled([getattr(e, k) for e in estimates]) for k in ("value", "low", "high"))
    return Series(name, colour, values, x, low, high)


def _of_phases(chart: Chart, updates: Sequence[UpdateRecord], lines: Sequence[Series]) -> Chart:
    """Limit a divergence to the phases that have it, with a logarithmic axis where it spans over a decade."""
    has_it = [any(line.values[i] is not None for line in lines) for i in range(len(updates))]
    own = [update for update, has in zip(updates, has_it, strict=True) if has]
    known = [value for line in lines for value in line.values if value is not None]
    return replace(
        chart,
        span=None if len(own) == len(updates) else (own[0].update, own[-1].update),
        phases=tuple(dict.fromkeys(update.phase for update in own)),
        is_log=is_logarithmic(known),
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

    charted = [figure for figure in figures.TEACHER_FIGURES if figure.is_charted]
    for figure in (*figures.MEASURE_FIGURES.values(), *charted):
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


def is_logarithmic(known: Sequence[float]) -> bool:
    """Whether values are positive and span more than a decade."""
    return min(known) > 0 and max(known) > _DECADE * min(known)


def means(values: Sequence[float | None], stretch: int, factor: float) -> tuple[float | None, ...]:
    """Return the mean of the known values of each `stretch`, times a factor; None without any."""
    parts = (values[i : i + stretch] for i in range(0, len(values), stretch))
    known = ([value for value in part if value is not None] for part in parts)
    return tuple(factor * (sum(part) / len(part)) if part else None for part in known)
