"""Write a page that compares runs: what they reached, curves, cost, and the settings that differ."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from mergeopd.intervals import Values, difference_interval
from mergeopd.messages import joined
from mergeopd.reporting import figures
from mergeopd.reporting.figures import Figure
from mergeopd.reporting.jsonl import Numbers
from mergeopd.reporting.page.cost import RunCost, cost_of
from mergeopd.reporting.page.curves import (
    MAX_POINTS,
    Chart,
    Curves,
    Group,
    Series,
    accuracy_charts,
    is_logarithmic,
    means,
)
from mergeopd.reporting.page.evaluated import by_prompt, mean_reward
from mergeopd.reporting.page.html import name_of, render_page, status_of
from mergeopd.reporting.page.run_data import RunData, load_run
from mergeopd.reporting.result import Estimate, standing
from mergeopd.storage.folders import write_atomic

# Parts of the plan that are different in every run, and shown elsewhere.
_LEFT_OUT = ("name", "output", "recipe_file", "text_cache")
_MISSING = "-"


@dataclass(frozen=True, slots=True)
class Run:
    """One of the runs that are compared; `label` is unique among them."""

    label: str
    data: RunData
    cost: RunCost

    @property
    def status(self) -> str:
        return status_of(self.data)

    @property
    def standing(self) -> str:
        """The colour class of its result; `none` without one."""
        return standing(self.data.result) if self.data.result else "none"


@dataclass(frozen=True, slots=True)
class SuiteRow:
    """One suite: each run's accuracy of the merged student, and its difference from the first run's.

    `num_shared` counts the prompts that both have measured, on which the difference is computed.
    """

    accuracy: tuple[Estimate | None, ...]
    recovered: tuple[Estimate | None, ...]
    difference: tuple[Estimate | None, ...]
    num_shared: tuple[int, ...]


def write_comparison(folders: Sequence[Path], output: Path) -> tuple[Path, tuple[str, ...]]:
    """Write the page that compares runs; return its path and notes on missing or damaged files.

    Raises:
        StorageError: a folder is no run folder, it is of another format version, or the disk refuses.
    """
    runs = load_runs(folders)
    write_atomic(output, render_comparison(runs, datetime.now().astimezone()))
    return output, tuple(f"{run.label}: {note}" for run in runs for note in run.data.notes)


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read runs, and label each by its name, by its folder where names are equal."""
    every = [load_run(folder) for folder in folders]
    names, stems = [name_of(data) for data in every], [data.folder.resolve().name for data in every]
    paths = [str(data.folder) for data in every]
    labels = next((each for each in (names, stems, paths) if len(set(each)) == len(each)), None)
    labels = labels or [f"{path} ({i})" for i, path in enumerate(paths, start=1)]
    return [Run(label, data, cost_of(data)) for label, data in zip(labels, every, strict=True)]


def render_comparison(runs: Sequence[Run], now: datetime) -> str:
    """Render the page that compares runs."""
    curves = Curves((), (), tuple(_charts(runs)))
    rows = suite_rows(runs)
    costs = [
        {**run.cost.rows(), **{f"seconds of {k}": f"{v:.1f}" for k, v in run.cost.seconds.items()}}
        for run in runs
    ]
    return render_page(
        "comparison.html.j2",
        " and ".join(run.label for run in runs) if len(runs) == 2 else f"{len(runs)} runs",
        now,
        curves.document(),
        runs=runs,
        curves=curves,
        rows=rows,
        sentences=list(_sentences(runs, rows)),
        costs={
            title: [of.get(title, _MISSING) for of in costs]
            for title in dict.fromkeys(k for c in costs for k in c)
        },
        differing=differing_settings(runs),
    )


def suite_rows(runs: Sequence[Run]) -> dict[str, SuiteRow]:
    """Compare the merged students suite by suite."""
    results = [run.data.result for run in runs]
    suites = dict.fromkeys(suite for result in results if result for suite in result.suites)
    rows = {}
    for suite in suites:
        own = [result.suites.get(suite) if result else None for result in results]
        pairs = [_paired(runs[0].data, run.data, suite) for run in runs[1:]]
        rows[suite] = SuiteRow(
            accuracy=tuple(row.accuracy.get("merged") if row else None for row in own),
            recovered=tuple(row.recovered if row else None for row in own),
            difference=tuple(_difference(pair) for pair in pairs),
            num_shared=tuple(len(pair[0]) for pair in pairs),
        )
    return rows


def _paired(one: RunData, other: RunData, suite: str) -> tuple[Values, Values]:
    """Return the rewards of both merged students on the prompts that both were measured on."""
    first, second = (_rewards(data, suite) for data in (one, other))
    shared = [key for key in first if key in second]
    return np.array([first[key] for key in shared]), np.array([second[key] for key in shared])


def _rewards(data: RunData, suite: str) -> dict[tuple[str, str | None, int], float]:
    """Return the mean reward by prompt: its text, its reference, and how often both came before."""
    seen: Counter[tuple[str, str | None]] = Counter()
    rewards = {}
    for rows in by_prompt(data.responses.get("merged", ()), suite).values():
        key = (rows[0].prompt, rows[0].reference)
        rewards[*key, seen[key]] = mean_reward(rows)
        seen[key] += 1
    return rewards


def _difference(pair: tuple[Values, Values]) -> Estimate | None:
    first, second = pair
    if not len(first):
        return None
    interval = difference_interval(second, first)
    return Estimate(float(second.mean() - first.mean()), interval.low, interval.high)


def _sentences(runs: Sequence[Run], rows: Mapping[str, SuiteRow]) -> Iterator[str]:
    """Say for each run but the first where it differs; a difference counts if its interval excludes zero."""
    for i, run in enumerate(runs[1:]):
        known = {suite: row.difference[i] for suite, row in rows.items()}
        ahead = [s for s, d in known.items() if d is not None and (d.low or 0.0) > 0]
        behind = [s for s, d in known.items() if d is not None and (d.high or 0.0) < 0]
        num = sum(d is not None for d in known.values())
        if num:
            parts = [
                f"{word} in {joined(where, 'and') if where else 'none'}"
                for word, where in (("ahead", ahead), ("behind", behind))
            ]
            suites = "1 suite" if num == 1 else f"{num} suites"
            yield f"{run.label} is {', '.join(parts)} of {suites}, compared with {runs[0].label}"
        else:
            yield f"{run.label} and {runs[0].label} have not measured the same prompts"


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the settings, library versions and files that are not the same in all runs."""
    flat = [_settings(run.data) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    values = {key: [settings.get(key, _MISSING) for settings in flat] for key in keys}
    return {key: row for key, row in values.items() if len(set(row)) > 1}


def _settings(data: RunData) -> dict[str, str]:
    document = data.document or {}
    plan = {key: value for key, value in data.plan.items() if key not in _LEFT_OUT}
    settings = dict(_flat(plan, ""))
    settings |= {f"version of {name}": str(v) for name, v in document.get("versions", {}).items()}
    files = document.get("files", {})
    return settings | {f"content of {name}": str(digest)[:12] for name, digest in files.items()}


def _flat(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield the leaves of a plan with their keys as in `--set`; entries of lists by name if they have one."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, Sequence) and not isinstance(value, str) and value:
        for i, item in enumerate(value):
            has_name = isinstance(item, Mapping) and "name" in item
            yield from _flat(item, f"{key}.{item['name'] if has_name else i}")
    else:
        yield key, _MISSING if value is None else str(value)


def _charts(runs: Sequence[Run]) -> Iterator[Chart]:
    """Yield charts with a line per run: accuracies, objectives, means over domains, figures of the run."""
    charts: defaultdict[str, list[Series]] = defaultdict(list)
    for colour, run in enumerate(runs if any(run.data.accuracy for run in runs) else ()):
        last = run.data.updates[-1].update if run.data.updates else 0
        for chart in accuracy_charts(run.data.accuracy, run.data.result, last):
            lines = [line for line in chart.series if line.kind != "level"]
            charts[chart.figure.key] += [replace(line, name=run.label, colour=colour) for line in lines]
    for suite, series in charts.items():
        yield Chart("accuracy", Figure(suite, "", suite, unit="%", steady=True), tuple(series))
    for group, figure, value in _figures():
        lines = [_line(run, colour, figure, value) for colour, run in enumerate(runs) if run.data.updates]
        points = [
            (update, value)
            for line in lines
            for update, value in zip(line.x or (), line.values, strict=True)
            if value is not None
        ]
        if any(figure.is_informative(value) for _, value in points):
            updates, known = zip(*points, strict=True)
            shown = tuple(line for line in lines if set(line.values) != {None})
            is_log = figure.key in figures.MEASURES and is_logarithmic(known)
            yield Chart(group, figure, shown, (min(updates), max(updates)), is_log=is_log)


def _figures() -> Iterator[tuple[Group, Figure, Any]]:
    for figure in figures.MEASURE_FIGURES.values():
        yield "teachers", figure, lambda update, key: _mean(update.teachers, key, "num_tokens")
    for figure in figures.DOMAIN_FIGURES:
        if not figure.stacked and figure.key != "weight":
            yield "domains", figure, lambda update, key: _mean(update.domains, key, "num_rollouts")
    for figure in figures.RUN_FIGURES:
        yield "run", figure, figures.run_value


def _line(run: Run, colour: int, figure: Figure, value: Any) -> Series:
    updates = run.data.updates
    stretch = max(1, -(-len(updates) // MAX_POINTS))
    values = [value(update, figure.key) for update in updates]
    x = tuple(updates[i : i + stretch][-1].update for i in range(0, len(updates), stretch))
    return Series(run.label, colour, means(values, stretch, 100.0 if figure.unit == "%" else 1.0), x)


def _mean(parts: Mapping[str, Numbers], key: str, weight: str) -> float | None:
    """Return the mean of a figure over teachers or domains, weighted by their tokens or responses."""
    known = [
        (value, part.get(weight) or 0) for part in parts.values() if (value := part.get(key)) is not None
    ]
    total = sum(share for _, share in known)
    return sum(value * share for value, share in known) / total if total else None
