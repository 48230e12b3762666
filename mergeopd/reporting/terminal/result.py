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
from mergeopd.reporting.terminal.glyphs import plain_text, table
from mergeopd.reporting.terminal.timing import split_line

_MISSING = "-"
_STYLES = {"good": "bold green", "fair": "bold yellow", "poor": "bold red", "none": "dim"}


@dataclass(frozen=True, slots=True)
class ResultTable:
    """Renders a result, finished or with values still missing, and the paths of what was written."""

    result: Result
    paths: Mapping[str, Path | None] = field(default_factory=dict)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        ascii_only = options.ascii_only
        domains = self.result.domains
        if domains:
            yield self._table(ascii_only)
        if any("recovered" in row and row["recovered"] is None for row in domains.values()):
            yield Text(f"{_MISSING}  the expert is not better than the base", style="yellow")
        seconds = {stage: value for stage, value in self.result.seconds.items() if stage != "total"}
        if line := split_line(seconds, options.max_width, ascii_only=ascii_only, total=True):
            yield line
        for label, path in self.paths.items():
            if path is not None:
                yield Text.assemble(
                    (f"{label:<8}", "dim"), plain_text(str(path), ascii_only), overflow="fold"
                )

    def _table(self, ascii_only: bool) -> Table:
        domains = self.result.domains
        models = [model.replace("weight_average", "weight avg") for model in MODELS]
        rows = table(("domain", *models, "recovered"), ascii_only=ascii_only, title="Accuracy, greedy, in %")
        rows.columns[1 + MODELS.index("merged")].style = "bold"
        for name, row in domains.items():
            cells = [_percent(row.get(model)) for model in MODELS]
            rows.add_row(plain_text(name, ascii_only), *cells, _recovered(row.get("recovered")))
        if len(domains) > 1:
            means = [complete_mean(row.get(model) for row in domains.values()) for model in MODELS]
            rows.add_section()
            rows.add_row("mean", *map(_percent, means), _recovered(self.result.mean_recovered))
        return rows


def ending(event: RunFinished) -> ResultTable:
    """Render the end of a run: its result if any, the time by stage, the paths of written files."""
    result = replace(event.result or Result({}, None, {}), seconds=event.seconds)
    paths = {"result": event.result_path, "student": event.export_path, "report": event.report_path}
    return ResultTable(result, paths)


def _percent(value: float | None) -> str:
    return _MISSING if value is None else f"{100 * value:.1f}"


def _recovered(value: float | None) -> Text:
    return Text(_MISSING if value is None else f"{100 * value:.1f} %", style=_STYLES[grade(value)])
