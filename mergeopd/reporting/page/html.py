"""Write report.html: one file that loads nothing, built from the run folder only."""

from __future__ import annotations

import base64
import hashlib
import io
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from ruamel.yaml import YAML

from mergeopd import __version__
from mergeopd.reporting.events import (
    AlarmRaised,
    CheckpointSaved,
    Event,
    Note,
    Reporter,
    RunFinished,
    UpdateDone,
)
from mergeopd.reporting.figures import MEASURES, STAGES
from mergeopd.reporting.page.curves import ACCENT, build_curves
from mergeopd.reporting.page.responses import LEVELS, build_legends, build_responses
from mergeopd.reporting.page.run_data import RunData, load_run
from mergeopd.reporting.result import Estimate, grade
from mergeopd.reporting.terminal.timing import clock_text, shares
from mergeopd.storage import run_layout
from mergeopd.storage.folders import write_atomic
from mergeopd.storage.metrics import json_text

_NUM_COLOURS = 10
_MIN_PAUSE_S = 30.0
_MAX_SHARE = 0.02


def write_report(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """Write `report.html` into a run folder; return its path and notes on missing or damaged files.

    Raises:
        StorageError: there is no such run folder, it is of another format version, or the disk refuses.
    """
    data = load_run(folder)
    path = folder / run_layout.REPORT
    write_atomic(path, render(data, datetime.now().astimezone()))
    return path, data.notes


def render(data: RunData, now: datetime) -> str:
    """Render the page. Its content policy allows the page's own scripts by hash, and loads nothing."""
    curves = build_curves(data.updates)
    scripts = (_plotly(), _part("page.js"))
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    seconds = _seconds(data)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            plan=data.plan,
            document=data.document or {},
            name=data.plan.get("name") or data.folder.resolve().name,
            now=now.isoformat(sep=" ", timespec="seconds"),
            version=__version__,
            policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {hashes}",
            style=Markup(_part("style.css")),
            scripts=[Markup(script) for script in scripts],
            status=_status(data),
            done=data.updates[-1].update if data.updates else 0,
            num_tokens=sum(update.num_tokens for update in data.updates),
            kinds=data.result.kinds if data.result else (),
            curves=curves,
            # Escaped, so that no text can close the element.
            curves_json=Markup(json_text(curves.document()).replace("<", "\\u003c")),
            responses=build_responses(data.samples),
            divergences={"": "-log p of the student"} | {key: row.title for key, row in MEASURES.items()},
            legends=build_legends(data.samples),
            levels=LEVELS,
            seconds=seconds,
            total_s=data.result.seconds.get("total") if data.result else None,
            percents=shares(seconds),
            stage_colours={name: colour for name, (colour, _) in STAGES.items()},
            plan_text=_yaml(data.plan) if data.plan else "",
            clock_text=clock_text,
        )
    )


class HtmlReporter:
    """Writes report.html at checkpoints, alarms and ends of phases, if time allows, and at the end.

    It takes at most 2 % of the run's time. A failure becomes a note and does not end the run.
    """

    def __init__(self, folder: Path, notes: Reporter, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._notes = notes
        self._clock = clock
        self._not_before = 0.0
        self._phase = ""

    def emit(self, event: Event) -> None:
        if isinstance(event, UpdateDone):
            phase, self._phase = self._phase, event.phase
            due = bool(phase) and phase != event.phase
        else:
            due = isinstance(event, AlarmRaised | CheckpointSaved | RunFinished)
        if due and (self._clock() >= self._not_before or isinstance(event, RunFinished)):
            self._write()

    def _write(self) -> None:
        start = self._clock()
        try:
            write_report(self._folder)
        except Exception as error:  # noqa: BLE001 - a report must not end the run
            self._notes.emit(Note(f"{run_layout.REPORT} was not written: {error or type(error).__name__}"))
        took = self._clock() - start
        self._not_before = start + max(_MIN_PAUSE_S, took / _MAX_SHARE)


def _status(data: RunData) -> str:
    if data.is_finished:
        return "finished"
    done = data.updates[-1].update if data.updates else 0
    if data.num_updates is None:
        return f"after update {done:,}"
    if done == data.num_updates:
        return "trained, not finished"
    return f"update {done:,} of {data.num_updates:,}"


def _seconds(data: RunData) -> dict[str, float]:
    """Return seconds by stage: the result's, else of the updates so far. Time between stages is `other`."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for part in [data.result.seconds] if data.result else [update.cost.seconds for update in data.updates]:
        for stage, value in part.items():
            seconds[stage] += value
    total = seconds.pop("total", 0.0)
    if (rest := total - sum(seconds.values())) > 0.005 * total:
        seconds["other"] = rest
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _yaml(value: Mapping[str, Any]) -> str:
    text = io.StringIO()
    yaml = YAML()
    yaml.width = 10_000  # wrapped by the page
    yaml.dump(value, text)
    return text.getvalue()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mergeopd.reporting.page", "assets"),
        autoescape=True,  # prompts and responses are untrusted text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    environment.filters["interval"] = _interval
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["colour"] = _colour
    environment.filters["grade"] = grade
    return environment


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _interval(estimate: Estimate | None) -> str:
    """Format a 95 % interval in %; nothing where there is none."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    return f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f}"


def _colour(index: int) -> str:
    return "var(--accent)" if index == ACCENT else f"var(--c{index % _NUM_COLOURS})"


@cache
def _part(name: str) -> str:
    return (files("mergeopd.reporting.page") / "assets" / name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    text: str = get_plotlyjs()
    if "</script" in text or "<!--" in text:
        raise RuntimeError("this plotly.js cannot be embedded in a page; install another version of plotly")
    return text


@cache
def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
