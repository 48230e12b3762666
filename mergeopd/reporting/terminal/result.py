"""The result of a run in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from mergeopd.reporting.events import AlarmRaised, RunFinished
from mergeopd.reporting.result import KINDS, AlarmSummary, Estimate, Kind, Result, grade
from mergeopd.reporting.terminal.glyphs import plain_text, table
from mergeopd.reporting.terminal.timing import split_line

_MISSING = "-"
_STYLES = {"good": "bold green", "fair": "bold yellow", "poor": "bold red", "none": "dim"}

Accuracies = Mapping[str, Mapping[Kind, Estimate | None]]


@dataclass(frozen=True, slots=True)
class ResultTable:
    """Renders a result, and the paths of what was written."""

    result: Result
    paths: Mapping[str, Path | None] = field(default_factory=dict)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        ascii_only, result = options.ascii_only, self.result
        yield Text(f"The student {result.verdict}.\n", style="bold yellow" if result.alarms else "bold")
        yield from _alarms(result.alarms, ascii_only)
        yield self._headline(ascii_only)
        yield from self._legend(ascii_only)
        if len(result.models) > len(KINDS):
            yield Text()
            yield self._matrix(ascii_only)
        yield from _times_and_paths(result.seconds, self.paths, options)

    def _headline(self, ascii_only: bool) -> Table:
        result = self.result
        rows = table(
            ("domain", "n", *_titles()), ascii_only=ascii_only, title="Accuracy and its 95 % interval, in %"
        )
        rows.columns[-2].style = "bold"
        for name, row in result.suites.items():
            cells = _cells(result.headline(name))
            rows.add_row(
                plain_text(name, ascii_only), str(row.num_prompts), *cells, _recovered(row.recovered)
            )
        if len(result.suites) > 1:
            rows.add_section()
            rows.add_row("mean", "", *_cells(result.mean), _recovered(result.mean_recovered))
        return rows

    def _legend(self, ascii_only: bool) -> Iterator[Text]:
        titles = {model.key: model.title for model in self.result.models}
        if self.result.best_static is not None:
            yield Text(f"static  the best static merge: {titles[self.result.best_static]}", style="dim")
        if any(row.recovered.value is None for row in self.result.suites.values()):
            yield Text(f"{_MISSING}  the expert is not better than the base", style="yellow")
        for name, row in self.result.suites.items():
            if row.overlap:
                text = f"{name}: {row.overlap} of {row.num_prompts} prompts are also trained on"
                yield Text(plain_text(text, ascii_only))

    def _matrix(self, ascii_only: bool) -> Table:
        domains = self.result.suites
        columns = ("model", *(plain_text(domain, ascii_only) for domain in domains))
        rows = table(columns, ascii_only=ascii_only, title="Every model, in %")
        for model in self.result.models:
            cells = [percent(row.accuracy.get(model.key)) for row in domains.values()]
            own = [row.expert == model.key for row in domains.values()]
            shown = [
                Text(cell, style="bold" if is_own else "") for cell, is_own in zip(cells, own, strict=True)
            ]
            rows.add_row(plain_text(model.title, ascii_only), *shown)
        return rows


@dataclass(frozen=True, slots=True)
class PartialResultTable:
    """Renders the accuracies measured so far."""

    accuracies: Accuracies

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        ascii_only = options.ascii_only
        rows = table(("domain", *_titles()[:-1]), ascii_only=ascii_only, title="Accuracy, in %")
        for name, row in self.accuracies.items():
            rows.add_row(plain_text(name, ascii_only), *_cells(row))
        yield rows


@dataclass(frozen=True, slots=True)
class Ending:
    """Renders the end of a run: its result if any, the time by stage, the paths of written files."""

    event: RunFinished

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        event = self.event
        paths = {"result": event.result_path, "student": event.export_path, "report": event.report_path}
        if event.result is not None:
            yield ResultTable(replace(event.result, seconds=event.seconds), paths)
        else:
            yield from _alarms(event.alarms, options.ascii_only)
            yield from _times_and_paths(event.seconds, paths, options)


def alarm_text(alarm: AlarmRaised, *, with_cause: bool) -> str:
    """Format an alarm on one line, with its cause and remedy if they were not shown yet."""
    finding = f"{_title(alarm)} at update {alarm.update}: {alarm.finding}"
    return f"{finding}. Likely cause: {alarm.cause}. Remedy: {alarm.remedy}" if with_cause else finding


def alarm_style(alarm: AlarmRaised) -> str:
    return "bold red" if alarm.stops else "bold yellow"


def _title(alarm: AlarmRaised | AlarmSummary) -> str:
    return f"{alarm.name} ({alarm.subject})" if alarm.subject else alarm.name


def _alarms(alarms: Sequence[AlarmSummary], ascii_only: bool) -> Iterator[Text]:
    """Yield the names of a run's alarms, each with its first update and its subjects."""
    by_name: dict[str, list[AlarmSummary]] = {}
    for alarm in alarms:
        by_name.setdefault(alarm.name, []).append(alarm)
    for name, own in by_name.items():
        subjects = ", ".join(alarm.subject for alarm in own if alarm.subject)
        text = f"alarm   {name} at update {own[0].update}" + (f": {subjects}" if subjects else "")
        yield Text(plain_text(text, ascii_only), style="yellow", overflow="fold")
    if alarms:
        yield Text()


def _times_and_paths(
    seconds: Mapping[str, float], paths: Mapping[str, Path | None], options: ConsoleOptions
) -> Iterator[RenderableType]:
    by_stage = {stage: value for stage, value in seconds.items() if stage != "total"}
    if line := split_line(by_stage, options.max_width, ascii_only=options.ascii_only, total=True):
        yield line
    for label, path in paths.items():
        if path is not None:
            yield Text.assemble(
                (f"{label:<8}", "dim"), plain_text(str(path), options.ascii_only), overflow="fold"
            )


def _titles() -> tuple[str, ...]:
    return "base", "expert", "static", "merged", "recovered"


def _cells(row: Mapping[Kind, Estimate | None]) -> list[str]:
    """Format accuracies by kind; the merged student's with its interval."""
    cells = [percent(row.get(kind)) for kind in KINDS]
    merged = row.get("merged")
    if merged is not None and merged.low is not None and merged.high is not None:
        cells[KINDS.index("merged")] += f" ({100 * merged.low:.0f} to {100 * merged.high:.0f})"
    return cells


def percent(estimate: Estimate | None) -> str:
    """Format an accuracy in %, or a dash."""
    return _MISSING if estimate is None or estimate.value is None else f"{100 * estimate.value:.1f}"


def _recovered(estimate: Estimate) -> Text:
    text = percent(estimate)
    if estimate.low is not None and estimate.high is not None:
        text += f" ({100 * estimate.low:.0f} to {100 * estimate.high:.0f})"
    return Text(text, style=_STYLES[grade(estimate.value)])
