"""The live display of a terminal: one frame, redrawn in place a few times a second."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

from mergeopd.report.events import (
    CheckpointSaved,
    CheckpointSkipped,
    Event,
    Note,
    RunFinished,
    RunStarted,
    StageProgress,
    StageStarted,
    UpdateDone,
)
from mergeopd.report.figures import (
    DOMAIN_FIGURES,
    MEASURE_FIGURES,
    NUM_TOKENS,
    RUN_FIGURES,
    TEACHER_FIGURES,
    Figure,
    run_value,
)
from mergeopd.report.jsonl import Numbers, UpdateRecord
from mergeopd.report.result import Result
from mergeopd.report.terminal.glyphs import Glyphs, Sparkline, plain_text
from mergeopd.report.terminal.result import ResultTable, ending
from mergeopd.report.terminal.timing import clock_text, split_line
from mergeopd.report.terminal.view import RunView, Trend, measure_of

REFRESHES_PER_S = 4
_STAGE_AFTER_S = 2.0  # shorter stages would only flicker
_WIDEST = 110
_FIXED_LINES = 7  # progress, gaps, the line of numbers, the time, the cursor


class LiveReporter:
    """Draws the run in place; notes stay above the frame. A context manager that restores the terminal."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console = console
        self._clock = clock
        self._view = RunView()
        self._glyphs = Glyphs.of(console.options)
        no_wrap = Column(no_wrap=True, overflow="ellipsis")
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=no_wrap),
            BarColumn(None, table_column=Column(ratio=1)),
            _Count(no_wrap.copy()),
            _Times(lambda: self._view.left_s(clock()), no_wrap.copy()),
            console=console,
            get_time=clock,
            auto_refresh=False,
            expand=True,
        )
        self._run_task: TaskID | None = None
        self._stage_task: TaskID | None = None
        self._saved_at: int | None = None
        # The refresh thread draws while the run's thread reports. Never print while holding the lock: the
        # refresh thread takes rich's lock first, then this one.
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
            self._end_stage()
        self._live.stop()

    def emit(self, event: Event) -> None:
        """Take the event in; the next refresh shows it. Notes and the result are printed at once."""
        with self._lock:
            self._view.apply(event, self._clock())
            self._apply(event)
        match event:
            case Note():
                self._print("note", "cyan", event.text)
            case CheckpointSkipped():
                self._print("warning", "yellow", f"skipped {event.path}: {event.reason}")
            case RunFinished():
                self._live.stop()
                self._console.print()
                self._console.print(ending(event))
            case _ if not self._live.is_started:
                self._live.start()
            case _:
                pass

    def _print(self, label: str, style: str, text: str) -> None:
        self._console.print(Text.assemble((f"{label:<8}", style), plain_text(text, self._glyphs)))

    def _apply(self, event: Event) -> None:
        """Bring the progress bars up to date."""
        match event:
            case RunStarted():
                self._run_task = self._progress.add_task("", total=event.num_updates, unit="updates")
                self._show_position()
            case StageStarted():
                self._end_stage()
                what = f"{event.stage}  {event.detail}" if event.detail else event.stage
                self._stage_task = self._progress.add_task(
                    plain_text(what, self._glyphs), total=event.total or None, unit=event.unit, visible=False
                )
            case StageProgress() if self._stage_task is not None:
                self._progress.update(self._stage_task, completed=event.done)
            case UpdateDone():
                self._end_stage()
                self._show_position()
            case CheckpointSaved():
                self._saved_at = event.update
            case RunFinished():
                self._end_stage()
            case _:
                pass

    def _end_stage(self) -> None:
        if self._stage_task is not None:
            self._progress.remove_task(self._stage_task)
            self._stage_task = None

    def _show_position(self) -> None:
        """Name run and phase beside the bar, and set how far it is."""
        view = self._view
        if view.run is None or self._run_task is None:
            return
        phase = view.phase_of(min(view.done + 1, view.run.num_updates))
        title = view.run.name
        if phase is not None and len(view.run.phases) > 1:
            done = phase.done - (view.done < view.run.num_updates)  # `phase` is that of the next update
            title += f" {self._glyphs.dot} {phase.name} {done}/{phase.updates}"
        self._progress.update(
            self._run_task, completed=view.done, description=plain_text(title, self._glyphs)
        )

    def _frame(self) -> RenderableType:
        """The display as it is now, fitted to the size of the console."""
        width, height = self._console.size
        width = min(width, _WIDEST)
        with self._lock:
            return Constrain(Group(*self._parts(width, height)), width)

    def _parts(self, width: int, height: int) -> list[RenderableType]:
        stage = next((task for task in self._progress.tasks if task.id == self._stage_task), None)
        if stage is not None:
            stage.visible = (stage.elapsed or 0.0) >= _STAGE_AFTER_S
        parts: list[RenderableType] = [self._progress.make_tasks_table(self._progress.tasks)]
        if stage is None or not stage.visible:
            parts.append(Text())  # so that the frame keeps its height
        if self._view.evaluations:
            return [*parts, Text(), ResultTable(Result(self._view.evaluations, None, {}))]
        if self._view.last is not None:
            parts += self._figures(self._view.last, width, height - _FIXED_LINES)
        return parts

    def _figures(self, last: UpdateRecord, width: int, room: int) -> list[RenderableType]:
        """Tables of teachers and domains in at most `room` lines, the numbers of the run, a legend."""
        view = self._view
        measure = next((key for key in map(measure_of, last.teachers.values()) if key), "")
        of_teachers = [figure for figure in (*TEACHER_FIGURES, NUM_TOKENS) if figure.column]
        of_teachers = [MEASURE_FIGURES[measure], *of_teachers] if measure else of_teachers
        of_domains = view.columns(DOMAIN_FIGURES)
        tables = [("teacher", last.teachers, of_teachers), ("domain", last.domains, of_domains)]
        tables = [table for table in tables if table[1]]
        lines = max(0, room - 2 * len(tables))
        # Teachers come first; domains get half of the lines, or what teachers leave.
        for_domains = min(len(last.domains), max(lines // max(1, len(tables)), lines - len(last.teachers)))
        parts: list[RenderableType] = []
        for kind, rows, figures in tables:
            share = for_domains if kind == "domain" else min(len(rows), lines - for_domains)
            if share > 0:
                trend = measure_of if kind == "teacher" else _nll if not last.teachers else None
                parts += [Text(), self._table(kind, rows, figures, trend, share)]
                room -= 2 + share
        parts += [Text(), self._run_line(last)]
        parts += [line for line in [split_line(view.phase_seconds, self._glyphs, width)] if line is not None]
        legend = self._legend([*of_teachers, *of_domains] if last.teachers else of_domains)
        if 1 + len(legend.wrap(self._console, width)) <= room:
            parts += [Text(), legend]
        return parts

    def _table(
        self,
        kind: str,
        rows: Mapping[str, Numbers],
        figures: Sequence[Figure],
        trend: Callable[[Numbers], str] | None,
        lines: int,
    ) -> Table:
        """A row per teacher or domain in `lines` lines, with the history of the figure that `trend` names."""
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        table.add_column(kind, no_wrap=True, overflow="ellipsis", min_width=8, max_width=24)
        for figure in figures:
            table.add_column(figure.column, justify="right", no_wrap=True)
        if trend is not None:
            table.add_column("trend", style="cyan")
        shown = list(rows) if len(rows) <= lines else list(rows)[: lines - 1]
        for name in shown:
            cells: list[RenderableType] = [_cell(figure, rows[name]) for figure in figures]
            if trend is not None:
                history = self._view.trends.get((name, trend(rows[name])), Trend())
                cells.append(Sparkline(history.points, self._glyphs))
            table.add_row(Text(plain_text(name, self._glyphs)), *cells)
        if len(shown) < len(rows):
            table.add_row(Text(f"and {len(rows) - len(shown)} more", style="dim"))
        return table

    def _run_line(self, last: UpdateRecord) -> Text:
        pairs = [(f.column, _number(run_value(last, f.key), f.unit)) for f in self._view.columns(RUN_FIGURES)]
        if (speed := self._view.tokens_per_s) is not None:
            pairs.append(("tokens/s", Text(f"{speed:,.0f}")))
        if self._saved_at is not None:
            pairs.append(("saved at", Text(str(self._saved_at))))
        return Text("   ", no_wrap=True, overflow="ellipsis").join(
            Text.assemble((f"{label} ", "dim"), value) for label, value in pairs
        )

    def _legend(self, figures: Sequence[Figure]) -> Text:
        parts = [f"{figure.column}: {figure.subtitle}" for figure in figures if figure.subtitle]
        return Text(plain_text("; ".join(parts), self._glyphs), style="dim")


class _Count(ProgressColumn):
    """`64/256 responses`; empty without a total."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text()
        return Text(f"{int(task.completed):,}/{int(task.total):,} {task.fields['unit']}".rstrip())


class _Times(ProgressColumn):
    """Elapsed time, and for the run the estimated rest."""

    def __init__(self, left_s: Callable[[], float | None], table_column: Column) -> None:
        super().__init__(table_column)
        self._left_s = left_s

    def render(self, task: Task) -> Text:
        text = clock_text(task.elapsed or 0.0)
        left = self._left_s() if task.fields["unit"] == "updates" and not task.finished else None
        return Text(text if left is None else f"{text}, about {clock_text(left)} left", style="dim")


def _nll(numbers: Numbers) -> str:
    """Without teachers, the text's NLL is what falls."""
    return "nll"


def _cell(figure: Figure, numbers: Numbers) -> Text:
    own = measure_of(numbers)
    if figure.key in MEASURE_FIGURES and figure.key not in numbers and own:  # a bridge has its own measure
        return _number(numbers[own], figure.unit).append(f" {MEASURE_FIGURES[own].column}", "dim")
    return _number(numbers.get(figure.key), figure.unit)


def _number(value: float | None, unit: str) -> Text:
    if value is None:
        return Text()
    if not math.isfinite(value):
        return Text(str(value), style="bold red")
    if isinstance(value, int):
        return Text(f"{value:,}")
    if unit == "%":
        return Text(f"{100 * value:.0f} %")
    if unit == "tokens":
        return Text(f"{value:.1f}")
    if value != 0 and abs(value) < 1e-3:
        return Text(f"{value:.1e}")
    return Text(f"{value:.4f}" if abs(value) < 100 else f"{value:.4g}")
