"""The result of a merge: how much of each expert's headroom over the base the student has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from mergeopd.report.events import RunFinished
from mergeopd.report.glyphs import Glyphs, plain_text
from mergeopd.report.timing import split_line
from mergeopd.storage.folders import write_atomic
from mergeopd.storage.metrics import json_text

_MISSING = "-"
MODELS = ("base", "expert", "weight_average", "merged")
_HEADINGS = {"base": "base", "expert": "expert", "weight_average": "weight avg", "merged": "merged"}


def recovered_headroom(base: float, expert: float, merged: float) -> float | None:
    """(merged - base) / (expert - base); None where the expert is not better than the base."""
    return (merged - base) / (expert - base) if expert > base else None


def result_document(
    domains: Mapping[str, Mapping[str, float | None]], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """`result.json`: accuracies (0 to 1) per domain, recovered headroom and its mean, where the time went.

    Each domain gives `base`, `expert`, `merged` and `weight_average`; the last is None or left out where the
    experts cannot be averaged (different shapes). `mean_recovered` is over the domains that have headroom.

    Raises:
        ValueError: a domain has other keys, or lacks a value.
    """
    rows: dict[str, dict[str, float | None]] = {}
    for name, given in domains.items():
        if not set(given) <= set(MODELS):
            raise ValueError(f"domain {name!r} has {sorted(given)}, not only {sorted(MODELS)}")
        base, expert, merged = (given.get(model) for model in ("base", "expert", "merged"))
        if base is None or expert is None or merged is None:
            raise ValueError(f"domain {name!r} lacks the accuracy of base, expert or merged")
        rows[name] = {
            **{model: given.get(model) for model in MODELS},
            "recovered": recovered_headroom(base, expert, merged),
        }
    return {
        "domains": rows,
        "mean_recovered": _mean(row["recovered"] for row in rows.values() if row["recovered"] is not None),
        "seconds": dict(seconds),
    }


def write_result(path: Path, document: Mapping[str, Any]) -> None:
    """Write `result.json`, whole or not at all.

    Raises:
        StorageError: the disk refuses.
    """
    write_atomic(path, json_text(document, indent=2) + "\n")


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean, or None when there is no value or one is missing."""
    numbers = list(values)
    known = [number for number in numbers if number is not None]
    return sum(known) / len(known) if known and len(known) == len(numbers) else None


@dataclass(frozen=True, slots=True)
class ResultTable:
    """Renders a result document, finished or with values still missing."""

    document: Mapping[str, Any]
    result_path: Path | None = None
    export_path: Path | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        glyphs = Glyphs.of(options)
        rows = self.document["domains"].values()
        if rows:
            yield self._table(glyphs)
        if any("recovered" in row and row["recovered"] is None for row in rows):
            yield Text(f"{_MISSING}  the expert is not better than the base", style="yellow")
        seconds = {stage: value for stage, value in self.document["seconds"].items() if stage != "total"}
        line = split_line(seconds, glyphs, options.max_width, total=True)
        if line is not None:
            yield line
        for label, path in (("result", self.result_path), ("student", self.export_path)):
            if path is not None:
                yield Text.assemble((f"{label:<8}", "dim"), plain_text(str(path), glyphs), overflow="fold")

    def _table(self, glyphs: Glyphs) -> Table:
        domains: Mapping[str, Mapping[str, float | None]] = self.document["domains"]
        table = Table(
            title="Accuracy, greedy, in %",
            title_justify="left",
            title_style="bold",
            box=glyphs.table_box,
            header_style="dim",
            pad_edge=False,
        )
        table.add_column("domain", overflow="fold")
        for model in MODELS:
            table.add_column(_HEADINGS[model], justify="right", style="bold" if model == "merged" else "")
        table.add_column("recovered", justify="right")
        for name, row in domains.items():
            cells = [_percent(row.get(model)) for model in MODELS]
            table.add_row(plain_text(name, glyphs), *cells, _recovered(row.get("recovered")))
        if len(domains) > 1:
            means = [_mean(row.get(model) for row in domains.values()) for model in MODELS]
            table.add_section()
            table.add_row(
                "mean",
                *(_percent(mean) for mean in means),
                _recovered(self.document["mean_recovered"]),
            )
        return table


def ending(event: RunFinished) -> ResultTable:
    """The last thing that a run shows: its result if any, where the time went, what lies where."""
    document = event.result or {"domains": {}, "mean_recovered": None}
    return ResultTable({**document, "seconds": event.seconds}, event.result_path, event.export_path)


def _percent(value: float | None) -> str:
    return _MISSING if value is None else f"{100 * value:.1f}"


def _recovered(value: float | None) -> Text:
    if value is None:
        return Text(_MISSING, style="dim")
    style = "bold green" if value >= 0.9 else "bold yellow" if value >= 0.5 else "bold red"
    return Text(f"{100 * value:.1f} %", style=style)
