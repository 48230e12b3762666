"""The result of a run in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from mergeopd.reporting.events import AccuracyMeasured, AlarmRaised, RunFinished
from mergeopd.reporting.result import KINDS, AlarmSummary, Estimate, Kind, Result, grade
from mergeopd.reporting.terminal.glyphs import plain_text, table
from mergeopd.reporting.terminal.timing import split_line
from mergeopd.storage.chat_replies import use_text
from mergeopd.storage.folders import MODEL_CARD

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
        if result.update is not None:
            yield Text(f"exported: the student after update {result.update}, the best during training")
        for kept in result.text_kept:
            yield Text(
                f"phase {kept.phase} kept {kept.kept_fraction:.0%} of the {kept.num_responses} responses of "
                f"{kept.teacher} in domain {kept.domain}"
            )
        for use in result.api_use:
            yield Text(f"{use.teacher} gave {use_text(use)}")
        for name, one in result.quantized.items():
            yield Text(f"{name} was read in {one.format}, {one.text}")
        if len(result.models) > len(result.kinds):
            yield Text()
            yield self._matrix(ascii_only)
        yield from times_and_paths(result.seconds, self.paths, options)

    def _headline(self, ascii_only: bool) -> Table:
        result = self.result
        rows = table(
            ("domain", "n", *_titles(result.kinds)),
            ascii_only=ascii_only,
            title="Accuracy and its 95 % interval, in %",
        )
        rows.columns[-2].style = "bold"
        for name, row in result.suites.items():
            cells = _cells(result.headline(name), result.kinds)
            rows.add_row(
                plain_text(name, ascii_only), str(row.num_prompts), *cells, _recovered(row.recovered)
            )
        if len(result.suites) > 1:
            rows.add_section()
            rows.add_row("mean", "", *_cells(result.mean, result.kinds), _recovered(result.mean_recovered))
        return rows

    def _legend(self, ascii_only: bool) -> Iterator[Text]:
        titles = {model.key: model.title for model in self.result.models}
        if self.result.best_static is not None:
            yield Text(f"static  the best static merge: {titles[self.result.best_static]}", style="dim")
        if self.result.best_control is not None:
            yield Text(f"control {self._tokens(titles)}", style="dim")
        rows = self.result.suites.values()
        # An estimate of the difference exists where both models were measured.
        compared = [row for row in rows if None not in (row.over_expert.value, row.over_base.value)]
        if any(row.recovered.value is None for row in compared):
            yield Text(f"{_MISSING}  the expert is not better than the base", style="yellow")
        for name, row in self.result.suites.items():
            if row.pass_at_k.get("merged"):
                passes = "  ".join(f"pass@{k} {percent(p)}" for k, p in row.pass_at_k["merged"].items())
                yield Text(plain_text(f"{name}: avg@{row.samples}; merged {passes}", ascii_only))
            if row.expert is None and row.over_base.value is not None:
                change = f"{100 * row.over_base.value:+.1f} points to the base"
                text = f"{name}: no prompt trains it; {change}{_range(row.over_base)}"
                yield Text(plain_text(text, ascii_only))
        for name, row in self.result.suites.items():
            if row.overlap:
                text = f"{name}: {row.overlap} of {row.num_prompts} prompts are also trained on"
                yield Text(plain_text(text, ascii_only))

    def _tokens(self, titles: Mapping[str, str]) -> str:
        """Name the best control, and how many tokens it and the student were trained on."""
        key, counts = self.result.best_control or "", self.result.trained_tokens
        text = f"{titles[key]}, at equal updates and prompts"
        if key in counts and "merged" in counts:
            text += f"; {counts[key]:,} response tokens, the student {counts['merged']:,}"
        return text

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
        is_controlled = any("control" in row for row in self.accuracies.values())
        kinds = tuple(kind for kind in KINDS if kind != "control" or is_controlled)
        rows = table(("domain", *_titles(kinds)[:-1]), ascii_only=ascii_only, title="Accuracy, in %")
        for name, row in self.accuracies.items():
            rows.add_row(plain_text(name, ascii_only), *_cells(row, kinds))
        yield rows


@dataclass(frozen=True, slots=True)
class Ending:
    """Renders the end of a run: its result if any, the time by stage, the paths of written files."""

    event: RunFinished

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        event = self.event
        paths = {"result": event.result_path, "student": event.export_path, "report": event.report_path}
        if event.export_path is not None:
            paths["card"] = event.export_path / MODEL_CARD  # how to load and serve the student
        if event.result is not None:
            yield ResultTable(event.result, paths)
        else:
            yield from _alarms(event.alarms, options.ascii_only)
            yield from times_and_paths(event.seconds, paths, options)


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


def times_and_paths(
    seconds: Mapping[str, float], paths: Mapping[str, Path | None], options: ConsoleOptions
) -> Iterator[RenderableType]:
    """Yield the time by stage, the paths of written files, and how to load a `student`."""
    by_stage = {stage: value for stage, value in seconds.items() if stage != "total"}
    rest = seconds.get("total", 0.0) - sum(by_stage.values())
    if rest > 0:
        by_stage["other"] = by_stage.get("other", 0.0) + rest
    if line := split_line(by_stage, options.max_width, ascii_only=options.ascii_only, total=True):
        yield line
    for label, path in paths.items():
        if path is not None:
            yield Text.assemble(
                (f"{label:<8}", "dim"), plain_text(str(path), options.ascii_only), overflow="fold"
            )
    if (student := paths.get("student")) is not None:
        load = f'AutoModelForCausalLM.from_pretrained("{student}")'
        yield Text.assemble(("load    ", "dim"), plain_text(load, options.ascii_only), overflow="fold")


def _titles(kinds: Sequence[Kind]) -> tuple[str, ...]:
    return *("static" if kind == "static_merge" else kind for kind in kinds), "recovered"


def _cells(row: Mapping[Kind, Estimate | None], kinds: Sequence[Kind]) -> list[str]:
    """Format accuracies by kind; the merged student's with its interval."""
    cells = [percent(row.get(kind)) for kind in kinds]
    merged = row.get("merged")
    cells[kinds.index("merged")] += _range(merged)
    return cells


def _range(estimate: Estimate | None) -> str:
    """Format an interval in parentheses; nothing where there is none."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    return f" ({100 * estimate.low:.0f} to {100 * estimate.high:.0f})"


def accuracy_line(event: AccuracyMeasured) -> str:
    """Format an accuracy during training: `accuracy after 20 updates: math 63.3 %, code 41.0 %`."""
    parts = ", ".join(f"{suite} {percent(estimate)} %" for suite, estimate in event.accuracy.items())
    return f"accuracy after {event.update} updates: {parts}"


def percent(estimate: Estimate | None) -> str:
    """Format an accuracy in %, or a dash."""
    return _MISSING if estimate is None or estimate.value is None else f"{100 * estimate.value:.1f}"


def _recovered(estimate: Estimate) -> Text:
    return Text(percent(estimate) + _range(estimate), style=_STYLES[grade(estimate.value)])
