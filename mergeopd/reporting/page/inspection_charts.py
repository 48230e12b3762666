"""Build charts of an inspection: curves by token position, a map of teachers. Places are in % of a chart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mergeopd.reporting.inspection import PositionBucket, Signal, TeacherInspection, VerdictKind
from mergeopd.reporting.page.text import visible

_NUM_TICKS = 4
_LINE, _LETTER, _DOT = 6.5, 2.3, 3.5
"""Height of a label on the map, width of its letters, and half a circle, in % of the map on a phone."""
_MAX_LABEL = 18
"""Letters: longer labels might fit at neither side."""
_MAX_X_LABELS = 9
_MINUS = "\u2212"


@dataclass(frozen=True, slots=True)
class Tick:
    """A label at a place on an axis."""

    place: float
    label: str


@dataclass(frozen=True, slots=True)
class Line:
    """A curve as SVG path data, its points as paths of length zero. `colour` is a custom property."""

    name: str
    colour: str
    path: str
    points: str
    whiskers: str
    is_thin: bool


@dataclass(frozen=True, slots=True)
class Band:
    """The part of a chart that belongs to one bucket of positions; `rows` are shown when it is pointed at."""

    left: float
    width: float
    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class PositionChart:
    """Curves over token positions. `marker` is the place of the position from which a teacher is noisy."""

    title: str
    subtitle: str
    lines: tuple[Line, ...]
    bands: tuple[Band, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marker: float | None = None
    zero: float | None = None


@dataclass(frozen=True, slots=True)
class Curve:
    """The values of a curve, one per bucket."""

    name: str
    colour: str
    values: tuple[float | None, ...]
    is_thin: bool = False
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()


def position_charts(
    signal: Signal | None, by_domain: Mapping[str, Signal], beyond: int | None
) -> tuple[PositionChart, ...]:
    """Build the charts of a teacher's signal; with several domains, each with the same buckets has a line."""
    if signal is None or not signal.positions:
        return ()
    buckets = signal.positions
    edges = [(bucket.start, bucket.stop) for bucket in buckets]
    domains = {
        name: one.positions
        for name, one in by_domain.items()
        if [(bucket.start, bucket.stop) for bucket in one.positions] == edges
    }
    if len(domains) < 2:
        domains = {}

    def curves(key: str, factor: float = 1.0) -> list[Curve]:
        own = Curve("all prompts" if domains else "", "--accent", _column(buckets, key, factor))
        parts = enumerate(domains.items())
        return [
            own,
            *(
                Curve(visible(name), f"--c{(i + 1) % 10}", _column(part, key, factor), is_thin=True)
                for i, (name, part) in parts
            ),
        ]

    entropies = [
        Curve("student", "--accent", _column(buckets, "entropy_S")),
        Curve("teacher", "--good", _column(buckets, "entropy_T")),
        Curve("teacher, own responses", "--fair", _column(buckets, "own_entropy_T")),
    ]
    figures = (
        ("Reverse KL", "nats per token", curves("reverse_kl")),
        ("Overlap", f"of the {signal.k} likeliest tokens, in %", curves("overlap", 100.0)),
        ("Entropy", "of the next-token distribution, in nats", entropies),
        ("Overlap advantage", "on the common tokens, in nats; 0 where both agree", curves("advantage")),
    )
    charts = (_chart(title, subtitle, buckets, lines, beyond) for title, subtitle, lines in figures)
    return tuple(chart for chart in charts if chart is not None)


def alignment_chart(buckets: Sequence[PositionBucket]) -> PositionChart | None:
    """Build the chart of gradient alignment by position; None where there is none."""
    value, low, high = (_column(buckets, f"alignment{end}") for end in ("", "_low", "_high"))
    curve = Curve("", "--accent", value, low=low, high=high)
    return _chart(
        "Alignment by position", "cosine with the ideal gradient", buckets, [curve], None, unit="nodes"
    )


def _column(buckets: Sequence[PositionBucket], key: str, factor: float = 1.0) -> tuple[float | None, ...]:
    values: Iterator[float | None] = (getattr(bucket, key) for bucket in buckets)
    return tuple(None if value is None else factor * value for value in values)


def _chart(
    title: str,
    subtitle: str,
    buckets: Sequence[PositionBucket],
    curves: Sequence[Curve],
    beyond: int | None,
    unit: str = "tokens",
) -> PositionChart | None:
    """Build a chart with buckets of equal widths and a vertical axis that includes 0."""
    shown = [curve for curve in curves if any(value is not None for value in curve.values)]
    columns = (column for curve in shown for column in (curve.values, curve.low, curve.high))
    known = [value for column in columns for value in column if value is not None]
    if not known:
        return None
    ticks = nice_ticks(min(0.0, *known), max(0.0, *known))
    low, high = ticks[0], ticks[-1]
    width = 100.0 / len(buckets)

    def y(value: float) -> float:
        return 100.0 * (high - value) / (high - low)

    bands = []
    for i, bucket in enumerate(buckets):
        rows = [("positions", f"{bucket.start:,} to {bucket.stop - 1:,}"), (unit, f"{bucket.num_tokens:,}")]
        for curve in shown:
            value = curve.values[i]
            rows.append((curve.name or title, "-" if value is None else f"{value:.3g}"))
            if curve.low and curve.low[i] is not None:
                rows.append(("95 % interval", f"{curve.low[i]:.3g} to {curve.high[i]:.3g}"))
        bands.append(Band(i * width, width, tuple(rows)))
    return PositionChart(
        title=title,
        subtitle=subtitle,
        lines=tuple(_line(curve, width, y) for curve in shown),
        bands=tuple(bands),
        x_ticks=_edges(buckets),
        y_ticks=tuple(Tick(y(value), _label(value)) for value in ticks),
        marker=None if beyond is None else _place(beyond, buckets),
        zero=y(0.0) if low < 0.0 < high else None,
    )


def _line(curve: Curve, width: float, y: Callable[[float], float]) -> Line:
    """Join the known values at the middles of the buckets; a gap stays a gap."""
    places = [
        None if value is None else f"{(i + 0.5) * width:.2f} {y(value):.2f}"
        for i, value in enumerate(curve.values)
    ]
    path = "".join(
        f"{'M' if i == 0 or places[i - 1] is None else 'L'}{place}"
        for i, place in enumerate(places)
        if place is not None
    )
    points = "".join(f"M{place}h0" for place in places if place)
    bounds = enumerate(zip(curve.low, curve.high, strict=True))
    whiskers = "".join(
        f"M{(i + 0.5) * width:.2f} {y(low):.2f}V{y(high):.2f}"
        for i, (low, high) in bounds
        if low is not None and high is not None
    )
    return Line(curve.name, curve.colour, path, points, whiskers, curve.is_thin)


def _edges(buckets: Sequence[PositionBucket]) -> tuple[Tick, ...]:
    """Label the edges between buckets, some of them where they are many."""
    edges = [*(bucket.start for bucket in buckets), buckets[-1].stop]
    last = len(edges) - 1
    counts = range(min(last, _MAX_X_LABELS - 1), 0, -1)
    count = next((n for n in counts if last % n == 0 and n >= 3), counts[0])
    chosen = [round(i * last / count) for i in range(count + 1)]
    return tuple(Tick(100.0 * i / last, f"{edges[i]:,}") for i in chosen)


def _place(position: int, buckets: Sequence[PositionBucket]) -> float | None:
    """Return the place of a position between the edges of its bucket; None outside all of them."""
    for i, bucket in enumerate(buckets):
        if bucket.start <= position < bucket.stop:
            return 100.0 * (i + (position - bucket.start) / (bucket.stop - bucket.start)) / len(buckets)
    return None


def nice_ticks(low: float, high: float) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten, from below `low` to above `high`."""
    span = high - low or 1.0
    power = 10.0 ** math.floor(math.log10(span / _NUM_TICKS))
    step = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= _NUM_TICKS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)  # all values are 0
    return [round(i * step, 12) for i in range(first, last + 1)]


def _label(value: float) -> str:
    return f"{value:g}".replace("-", _MINUS)


@dataclass(frozen=True, slots=True)
class Mark:
    """A teacher on the map. `size` is in pixels; its label is at the right or left, `shift` lines lower."""

    index: int
    name: str
    kind: VerdictKind
    x: float
    y: float
    size: float
    overlap: float
    gain: float
    is_left: bool = False
    shift: int = 0

    def is_clear_of(self, other: Mark) -> bool:
        """Whether the label covers neither the label nor the circle of another mark."""
        left, right, top, bottom = self._label()
        boxes = (other._label(), (other.x - _DOT, other.x + _DOT, other.y - _LINE / 2, other.y + _LINE / 2))
        return all(right <= a or b <= left or bottom <= c or d <= top for a, b, c, d in boxes)

    def is_inside(self) -> bool:
        """Whether the label is inside the map."""
        left, right, top, bottom = self._label()
        return left >= 0 and right <= 100 + 2 * _DOT and top >= -_LINE and bottom <= 100 + _LINE / 2

    def _label(self) -> tuple[float, float, float, float]:
        width, middle = _DOT + _LETTER * len(self.name), self.y + self.shift * _LINE
        left = self.x - width if self.is_left else self.x + _DOT
        return left, left + width - _DOT, middle - _LINE / 2, middle + _LINE / 2


@dataclass(frozen=True, slots=True)
class TeacherMap:
    """Teachers by overlap and by how much more often they pass than the student; `missing` lack either."""

    marks: tuple[Mark, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    zero: float
    missing: tuple[str, ...]


def teacher_map(teachers: Sequence[TeacherInspection]) -> TeacherMap | None:
    """Build the map of the teachers; None where none has both numbers."""
    rows = []
    for i, teacher in enumerate(teachers):
        signal = teacher.signal
        if signal is None:
            continue
        rates = signal.pass_rate_T.value, signal.pass_rate_S.value
        if signal.overlap.value is not None and rates[0] is not None and rates[1] is not None:
            gain = 100.0 * (rates[0] - rates[1])
            rows.append((i, teacher, signal.overlap.value, gain, signal.reverse_kl.value))
    if not rows:
        return None
    gains = [row[3] for row in rows]
    ticks = nice_ticks(min(0.0, *gains), max(0.0, *gains))
    low, high = ticks[0], ticks[-1]
    marks = []
    for i, teacher, overlap, gain, divergence in rows:
        y = 100.0 * (high - gain) / (high - low)
        size = 12.0 + 14.0 * math.sqrt(min(1.0, divergence or 0.0))
        name = visible(teacher.name)
        name = name if len(name) <= _MAX_LABEL else f"{name[: _MAX_LABEL - 1]}…"
        marks.append(Mark(i, name, teacher.verdict.kind, 100.0 * overlap, y, size, overlap, gain))
    names = {row[1].name for row in rows}
    return TeacherMap(
        marks=_with_labels_apart(marks),
        x_ticks=tuple(Tick(25.0 * i, f"{25 * i} %") for i in range(5)),
        y_ticks=tuple(Tick(100.0 * (high - value) / (high - low), _signed(value)) for value in ticks),
        zero=100.0 * high / (high - low),
        missing=tuple(teacher.name for teacher in teachers if teacher.name not in names),
    )


def _with_labels_apart(marks: Sequence[Mark]) -> tuple[Mark, ...]:
    """Place the label of each mark, from the top, where it covers no other mark; the nearest such place."""
    waiting, done = sorted(marks, key=lambda mark: mark.y), list[Mark]()
    while waiting:
        mark = waiting.pop(0)
        places = [
            replace(mark, shift=shift, is_left=is_left)
            for shift in (0, 1, -1, 2, -2)
            for is_left in (False, True)
        ]
        inside = [place for place in places if place.is_inside()] or places
        others = [*done, *waiting]
        # The labels of marks that wait are not placed yet: they count where they would be first.
        clear = (place for place in inside if all(place.is_clear_of(other) for other in others))
        done.append(next(clear, inside[0]))
    return tuple(done)


def _signed(value: float) -> str:
    return f"{value:+g}".replace("-", _MINUS) if value else "0"
