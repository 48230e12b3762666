"""Write report.html: one file that loads nothing, built from the run folder only."""

from __future__ import annotations

import base64
import hashlib
import io
import shlex
import time
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
from mergeopd.reporting.page.cost import cost_of
from mergeopd.reporting.page.curves import ACCENT, GOOD, SOFT, build_curves
from mergeopd.reporting.page.evaluated import build_failures
from mergeopd.reporting.page.responses import LEVELS, build_legends, build_responses
from mergeopd.reporting.page.run_data import RunData, load_run
from mergeopd.reporting.page.text import visible
from mergeopd.reporting.result import Estimate, grade, shortfall, standing
from mergeopd.reporting.terminal.timing import clock_text
from mergeopd.storage import run_layout
from mergeopd.storage.folders import write_atomic
from mergeopd.storage.metrics import json_text

_NUM_COLOURS = 10
_NAMED = {ACCENT: "var(--accent)", SOFT: "var(--soft)", GOOD: "var(--good)"}
_MIN_PAUSE_S = 30.0
_MAX_SHARE = 0.02


def write_report(folder: Path, output: Path | None = None) -> tuple[Path, tuple[str, ...]]:
    """Write `report.html` into a run folder, or another page; return it, and notes on damaged files.

    Raises:
        StorageError: there is no such run folder, it is of another format version, or the disk refuses.
    """
    data = load_run(folder)
    path = output or folder / run_layout.REPORT
    write_atomic(path, render(data, datetime.now().astimezone()))
    return path, data.notes


def render(data: RunData, now: datetime) -> str:
    """Render the page of a run."""
    curves = build_curves(data.updates, data.accuracy, data.result)
    sampled = build_responses(data.samples)
    document = {**curves.document(), "candidates": sampled.candidates if sampled else {}}
    return render_page(
        "report.html.j2",
        name_of(data),
        now,
        document,
        data=data,
        plan=data.plan,
        plan_document=data.document or {},
        started=_started(data),
        status=status_of(data),
        standing=_standing(data),
        shortfall=shortfall(data.result) if data.result is not None and data.is_finished else "",
        done=data.updates[-1].update if data.updates else 0,
        kinds=data.result.kinds if data.result else (),
        curves=curves,
        sampled=sampled,
        failures=build_failures(data),
        divergences={"": "-log p of the student"} | {key: row.title for key, row in MEASURES.items()},
        legends=build_legends(data.samples),
        levels=LEVELS,
        cost=cost_of(data),
        stage_colours={name: colour for name, (colour, _) in STAGES.items()},
        plan_text=_yaml(data.plan) if data.plan else "",
        usage=usage(data.folder.resolve() / run_layout.EXPORT) if data.exported else {},
    )


def render_page(
    template: str,
    name: str,
    now: datetime,
    document: Mapping[str, Any],
    *,
    script: str | None = "page.js",
    has_charts: bool = True,
    **context: Any,
) -> str:
    """Render a template with the data of its script; plotly.js is in it if it `has_charts`.

    The page's content policy allows its own scripts by hash, and loads nothing.
    """
    scripts = (*([_plotly()] if has_charts else []), _part("base.js") + (_part(script) if script else ""))
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    return (
        _environment()
        .get_template(template)
        .render(
            name=name,
            now=clock_time(now),
            version=__version__,
            policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {hashes}",
            style=Markup(_part("style.css")),
            scripts=[Markup(script) for script in scripts],
            # Escaped, so that no text can close the element.
            page_json=Markup(json_text(document).replace("<", "\\u003c")),
            **context,
        )
    )


def name_of(data: RunData) -> str:
    """Return the name of a run, or of its folder where the plan is not known."""
    return str(data.plan.get("name") or data.folder.resolve().name)


def clock_time(moment: datetime) -> str:
    """Format a time in the zone of this machine; times without one are of this machine."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M %Z")


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


def status_of(data: RunData) -> str:
    """Say how far a run is."""
    if data.is_finished:
        return "finished"
    done = data.updates[-1].update if data.updates else 0
    if data.num_updates is None:
        return f"after update {done:,}"
    if done == data.num_updates:
        return "trained, not finished"
    return f"update {done:,} of {data.num_updates:,}"


def _started(data: RunData) -> str | None:
    try:
        return clock_time(datetime.fromisoformat(str((data.document or {})["started"])))
    except (KeyError, ValueError):
        return None


def _standing(data: RunData) -> str:
    """Return the colour class of a finished run's result; with alarms it is not green."""
    if data.result is None or not data.is_finished:
        return "none"
    reached = standing(data.result)
    return "fair" if reached == "good" and data.alarms else reached


def usage(export: Path) -> dict[str, str]:
    """Return how to load and serve an exported student, by program."""
    path = shlex.quote(str(export))
    has_template = (export / "chat_template.jinja").is_file()
    text = '[{"role": "user", "content": "..."}]' if has_template else '"..."'
    call = "tokenizer.apply_chat_template" if has_template else "tokenizer"
    more = ", add_generation_prompt=True, return_dict=True" if has_template else ""
    return {
        "transformers": f"""from transformers import AutoModelForCausalLM, AutoTokenizer

path = {str(export)!r}
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
inputs = {call}({text}{more}, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256)[0]))""",
        "vLLM": f"vllm serve {path} --host 127.0.0.1 --port 8000",
        "SGLang": f"python -m sglang.launch_server --model-path {path} --host 127.0.0.1 --port 8000",
    }


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
        finalize=lambda value: visible(value) if type(value) is str else value,  # not markup
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    environment.filters["interval"] = _interval
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["colour"] = _colour
    environment.filters["grade"] = grade
    environment.filters["bounds"] = _bounds
    environment.globals["clock_text"] = clock_text
    return environment


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _interval(estimate: Estimate | None) -> str:
    """Format a 95 % interval in %; nothing where there is none."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    return f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f}"


def _bounds(estimate: Estimate) -> str:
    """Return the place of a value's interval on a track from 0 to 1, as a style."""
    if estimate.low is None or estimate.high is None:
        return "display:none"
    return f"left:{100 * estimate.low:.2f}%;width:{100 * (estimate.high - estimate.low):.2f}%"


def _colour(index: int) -> str:
    return _NAMED.get(index, f"var(--c{index % _NUM_COLOURS})")


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
