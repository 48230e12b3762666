"""The result table of a run in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from mergeopd.reporting.events import RunFinished
from mergeopd.reporting.result import MODELS, Result, complete_mean, grade
from mergeopd.reporting.terminal.glyphs import Glyphs, plain_text
from mergeopd.reporting.terminal.timing import split_line

_MISSING = "-"
_STYLES = {"good": "bold green", "fair": "bold yellow", "poor": "bold red", "none": "dim"}
_HEADINGS = {"base": "base", "expert": "expert", "weight_average": "weight avg", "merged": "merged"}


@dataclass(frozen=True, slots=True)
class ResultTable:
    """Renders a result, finished or with values still missing, and the paths of what was written."""

    result: Result
    paths: Mapping[str, Path | None] = field(default_factory=dict)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        glyphs = Glyphs.of(options)
        rows = self.result.domains.values()
        if rows:
            yield self._table(glyphs)
        if any("recovered" in row and row["recovered"] is None for row in rows):
            yield Text(f"{_MISSING}  the expert is not better than the base", style="yellow")
        seconds = {stage: value for stage, value in self.result.seconds.items() if stage != "total"}
        line = split_line(seconds, glyphs, options.max_width, total=True)
        if line is not None:
            yield line
        for label, path in self.paths.items():
            if path is not None:
                yield Text.assemble((f"{label:<8}", "dim"), plain_text(str(path), glyphs), overflow="fold")

    def _table(self, glyphs: Glyphs) -> Table:
        domains = self.result.domains
        table = glyphs.table("Accuracy, greedy, in %")
        table.add_column("domain", overflow="fold")
        for model in MODELS:
            table.add_column(_HEADINGS[model], justify="right", style="bold" if model == "merged" else "")
        table.add_column("recovered", justify="right")
        for name, row in domains.items():
            cells = [_percent(row.get(model)) for model in MODELS]
            table.add_row(plain_text(name, glyphs), *cells, _recovered(row.get("recovered")))
        if len(domains) > 1:
            means = [complete_mean(row.get(model) for row in domains.values()) for model in MODELS]
            table.add_section()
            table.add_row(
                "mean",
                *(_percent(mean) for mean in means),
                _recovered(self.result.mean_recovered),
            )
        return table


def ending(event: RunFinished) -> ResultTable:
    """Render the end of a run: its result if any, the time by stage, the paths of written files."""
    result = replace(event.result or Result({}, None, {}), seconds=event.seconds)
    paths = {"result": event.result_path, "student": event.export_path, "report": event.report_path}
    return ResultTable(result, paths)


def _percent(value: float | None) -> str:
    return _MISSING if value is None else f"{100 * value:.1f}"


def _recovered(value: float | None) -> Text:
    return Text(_MISSING if value is None else f"{100 * value:.1f} %", style=_STYLES[grade(value)])
