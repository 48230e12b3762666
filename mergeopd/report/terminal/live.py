"""The live display of a terminal: one frame, redrawn in place a few times a second."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.constrain import Constrain
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mergeopd.report.events import CheckpointSkipped, DomainStats, Event, Note, RunFinished, UpdateDone
from mergeopd.report.page.curves import divergence
from mergeopd.report.terminal.glyphs import Glyphs, plain_text, sparkline
from mergeopd.report.terminal.result import ResultTable, ending
from mergeopd.report.terminal.timing import clock_text, split_line
from mergeopd.report.terminal.view import RunView

REFRESHES_PER_S = 4
_STAGE_AFTER_S = 2.0  # shorter stages would only flicker
_WIDEST = 110
# Where the names of divergences are too long for a column.
_SHORT = {
    "skew_forward_kl": "skew fwd KL",
    "skew_reverse_kl": "skew rev KL",
    "clipped_forward_kl": "clipped KL",
    "sampled_reverse_kl": "sampled KL",
}


class LiveReporter:
    """Draws the run in place; notes stay above the frame. A context manager that gives the terminal back."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console = console
        self._clock = clock
        self._view = RunView()
        # The refresh thread draws while the run's thread reports. Never print while holding it: the refresh
        # thread takes rich's lock first, then this one.
        self._lock = threading.Lock()
        self._live = Live(
            get_renderable=self._frame,
            console=console,
            refresh_per_second=REFRESHES_PER_S,
            vertical_overflow="crop",
        )

    def __enter__(self) -> LiveReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._view.stage = None
        self._live.stop()

    def emit(self, event: Event) -> None:
        """Take the event in; the next refresh shows it. Notes and the result are printed at once."""
        now = self._clock()
        with self._lock:
            self._view.apply(event, now)
        glyphs = Glyphs.of(self._console.options)
        match event:
            case Note():
                self._console.print(Text.assemble(("note    ", "cyan"), plain_text(event.text, glyphs)))
            case CheckpointSkipped():
                text = f"skipped {event.path}: {event.reason}"
                self._console.print(Text.assemble(("warning ", "yellow"), plain_text(text, glyphs)))
            case RunFinished():
                self._live.stop()
                self._console.print()
                self._console.print(ending(event))
            case _ if not self._live.is_started:
                self._live.start()
            case _:
                pass

    def _frame(self) -> RenderableType:
        return Frame(self._view, self._lock, self._clock)


class Frame:
    """What the view looks like now, fitted to the console's size."""

    def __init__(self, view: RunView, lock: threading.Lock, clock: Callable[[], float]) -> None:
        self._view = view
        self._lock = lock
        self._clock = clock

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, _WIDEST)
        with self._lock:
            parts = _parts(self._view, self._clock(), width, console.height, Glyphs.of(options))
        yield Constrain(Group(*parts), width)


def _parts(view: RunView, now: float, width: int, height: int, glyphs: Glyphs) -> list[RenderableType]:
    parts: list[RenderableType] = []
    if view.run is not None:
        parts += [_header(view, now, glyphs), _bar(view, width)]
    if view.evaluations and view.finished is None:
        document = {"domains": view.evaluations, "mean_recovered": None, "seconds": {}}
        parts += [Text(), ResultTable(document)]
    elif view.last is not None:
        parts += _tables(view, view.last, width, height - 9, glyphs)
        parts += [Text(), _numbers(view, view.last)]
        split = split_line(view.phase_seconds, glyphs, width)
        parts += [split] if split is not None else []
    if view.finished is None:
        parts.append(Text())
        parts.append(_stage(view, now, glyphs))
    return parts


def _header(view: RunView, now: float, glyphs: Glyphs) -> RenderableType:
    run = view.run
    assert run is not None
    phase = view.phase_of(min(view.done + 1, run.num_updates))
    title = Text(plain_text(run.name, glyphs), style="bold", overflow="ellipsis", no_wrap=True)
    if phase is not None and len(run.phases) > 1:
        done = phase.done - (view.done < run.num_updates)  # its place is that of the update being made
        title.append(f" {glyphs.dot} ", style="dim")
        title.append(plain_text(phase.name, glyphs), style="not bold cyan")
        title.append(f" {done}/{phase.updates}", style="not bold")
    title.append(f" {glyphs.dot} ", style="dim")
    title.append(f"update {view.done}/{run.num_updates}", style="not bold")
    times = Text(clock_text(now - view.started_at), style="dim", no_wrap=True)
    left = view.left_s(now)
    if view.finished is None and view.done < run.num_updates and left is not None:
        times.append(f", about {clock_text(left)} left")
    line = Table.grid(expand=True, padding=(0, 2, 0, 0), pad_edge=False)
    line.add_column(ratio=1)
    line.add_column(justify="right")
    line.add_row(title, times)
    return line


def _bar(view: RunView, width: int) -> RenderableType:
    assert view.run is not None
    line = Table.grid()  # a bare bar does not end its line
    line.add_row(ProgressBar(total=view.run.num_updates, completed=view.done, width=width))
    return line


def _tables(view: RunView, last: UpdateDone, width: int, room: int, glyphs: Glyphs) -> list[RenderableType]:
    """Teachers and domains in at most `room` lines, titles and gaps included; teachers come first."""
    num_tables = 2 if last.teachers else 1
    lines = max(0, room - 2 * num_tables)
    for_domains = min(len(last.domains), max(lines // num_tables, lines - len(last.teachers)))
    parts: list[RenderableType] = []
    if last.teachers and lines > 0:
        parts += [Text(), _teacher_table(view, last, width, max(1, lines - for_domains), glyphs)]
    if last.domains and for_domains > 0:
        parts += [Text(), _domain_table(view, last, width, for_domains, glyphs)]
    return parts


def _grid(first: str, numbers: Sequence[str], *, trend: bool) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(first, no_wrap=True, overflow="ellipsis", min_width=8, max_width=24)
    for title in numbers:
        table.add_column(title, justify="right", no_wrap=True)
    if trend:
        table.add_column("trend", no_wrap=True, style="cyan")
    return table


def _fitting(names: Sequence[str], lines: int) -> tuple[Sequence[str], int]:
    """The names that fit, and how many do not (their number takes a line)."""
    if len(names) <= lines:
        return names, 0
    return names[: lines - 1], len(names) - lines + 1


def _title(quantity: str) -> str:
    title = divergence(quantity).title
    # Abbreviations stay capitals, words do not.
    return _SHORT.get(quantity) or (title if title.isupper() else title[:1].lower() + title[1:])


def _teacher_table(view: RunView, last: UpdateDone, width: int, lines: int, glyphs: Glyphs) -> RenderableType:
    quantity = next((name for stats in last.teachers.values() for name in stats.divergence), "")
    table = _grid("teacher", [_title(quantity), "gap", "tokens"], trend=True)
    names, hidden = _fitting(list(last.teachers), lines)
    longest = min(24, max((len(name) for name in (*names, "teacher")), default=0))
    for name in names:
        stats = last.teachers[name]
        # A bridge has a measure of its own.
        own = quantity if quantity in stats.divergence else next(iter(stats.divergence), quantity)
        trend = view.trends.get((name, own))
        value = _number(stats.divergence.get(own))
        table.add_row(
            Text(plain_text(name, glyphs)),
            value if own == quantity else value.append(f" {_title(own)}", "dim"),
            _number(stats.logprob_gap),
            Text(f"{stats.num_tokens:,}"),
            sparkline(trend.points if trend else (), min(48, width - longest - 38), glyphs),
        )
    if hidden:
        table.add_row(Text(f"and {hidden} more", style="dim"))
    return table


def _domain_table(view: RunView, last: UpdateDone, width: int, lines: int, glyphs: Glyphs) -> RenderableType:
    stats_of = last.domains
    columns: dict[str, Callable[[DomainStats], Text]] = {
        "NLL": lambda stats: _number(stats.nll),
        "entropy": lambda stats: _number(stats.entropy_S),
        "length": lambda stats: Text(f"{stats.mean_length:.1f}"),
        "cut": lambda stats: _percent(stats.truncated_fraction),
        "share": lambda stats: _percent(stats.token_share),
    }
    if any(stats.weight != 1.0 for stats in stats_of.values()):
        columns["weight"] = lambda stats: Text(f"{stats.weight:.2f}")
    if any(stats.reward is not None for stats in stats_of.values()):
        columns["reward"] = lambda stats: _number(stats.reward)
    trend = not last.teachers  # text without teachers: the domains' NLL is what falls
    table = _grid("domain", list(columns), trend=trend)
    names, hidden = _fitting(list(stats_of), lines)
    longest = min(24, max((len(name) for name in (*names, "domain")), default=0))
    for name in names:
        cells: list[RenderableType] = [column(stats_of[name]) for column in columns.values()]
        if trend:
            history = view.trends[name, "nll"].points
            cells.append(sparkline(history, min(48, width - longest - 12 * len(columns)), glyphs))
        table.add_row(Text(plain_text(name, glyphs)), *cells)
    if hidden:
        table.add_row(Text(f"and {hidden} more", style="dim"))
    return table


def _numbers(view: RunView, last: UpdateDone) -> Text:
    speed = view.tokens_per_s
    pairs = [
        ("loss", _number(last.loss)),
        ("grad", _number(last.grad_norm)),
        ("lr", Text(f"{last.lr:.1e}")),
        ("tokens/s", Text(f"{speed:,.0f}" if speed is not None else "-")),
    ]
    if last.on_policy_fraction != 1.0:
        pairs.append(("on-policy", _percent(last.on_policy_fraction)))
    if view.checkpoint is not None:
        pairs.append(("saved at", Text(str(view.checkpoint.update))))
    line = Text(no_wrap=True, overflow="ellipsis")
    for i, (label, value) in enumerate(pairs):
        line.append("" if i == 0 else "   ").append(f"{label} ", style="dim").append_text(value)
    return line


def _stage(view: RunView, now: float, glyphs: Glyphs) -> RenderableType:
    """The present stage once it has lasted; until then an empty line, so that the frame keeps its height."""
    stage = view.stage
    if stage is None or now - stage.started_at < _STAGE_AFTER_S:
        return Text()
    event = stage.event
    line = Table.grid(padding=(0, 2, 0, 0))
    what = Text(event.stage, style="cyan", no_wrap=True)
    what.append(f"  {plain_text(event.detail, glyphs)}" if event.detail else "", style="default")
    cells: list[RenderableType] = [what]
    if event.total:
        cells.append(ProgressBar(total=event.total, completed=stage.done, width=20))
        cells.append(Text(f"{stage.done:,}/{event.total:,} {event.unit}".rstrip(), no_wrap=True))
    cells.append(Text(clock_text(now - stage.started_at), style="dim", no_wrap=True))
    line.add_row(*cells)
    return line


def _number(value: float | None) -> Text:
    if value is None:
        return Text("")
    if not math.isfinite(value):
        return Text(str(value), style="bold red")
    if value != 0 and abs(value) < 1e-3:
        return Text(f"{value:.1e}")
    return Text(f"{value:.4f}" if abs(value) < 100 else f"{value:.4g}")


def _percent(value: float) -> Text:
    return Text(f"{100 * value:.0f} %")
