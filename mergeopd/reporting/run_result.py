"""The contents of a run folder, for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from mergeopd.errors import StorageError
from mergeopd.reporting.events import AlarmRaised
from mergeopd.reporting.result import Result, read_result
from mergeopd.storage import run_layout

if TYPE_CHECKING:
    import pandas
    import pyarrow


@dataclass(frozen=True, slots=True)
class RunResult:
    """The contents of a run folder.

    `export` is the trained student, a Hugging Face folder; None until the run has reached its last update.
    `accuracies` maps domain to kind of model (`base`, `expert`, `static_merge`, `merged`, and `control` if
    there is one) to accuracy from 0 to 1; empty where nothing was evaluated. `result` has every model, with
    intervals; None without evaluation. `metrics` has a row per update with dotted keys, for example
    `row["teachers.math.reverse_kl"]`. `is_finished`: exported and, if the recipe evaluates, evaluated.
    `num_updates` counts the optimizer updates made so far, `planned_updates` those of all phases. `alarms`
    are the signs that the run went wrong, in order.
    """

    folder: Path
    is_finished: bool
    num_updates: int
    planned_updates: int
    export: Path | None
    accuracies: Mapping[str, Mapping[str, float | None]]
    result: Result | None
    metrics: tuple[Mapping[str, Any], ...]
    alarms: tuple[AlarmRaised, ...]

    def to_arrow(self) -> pyarrow.Table:
        """Convert the metrics to a table with a column per key; null where an update lacks one."""
        import pyarrow

        keys = dict.fromkeys(key for row in self.metrics for key in row)
        return pyarrow.table({key: [row.get(key) for row in self.metrics] for key in keys})

    def to_pandas(self) -> pandas.DataFrame:
        """Convert the metrics to a pandas data frame. Raises ModuleNotFoundError without pandas."""
        return self.to_arrow().to_pandas()


def load_run(folder: str | Path) -> RunResult:
    """Read a run folder, finished or not.

    Raises:
        StorageError: there is no such run, or one of its files is damaged.
    """
    folder = Path(folder)
    plan_file = folder / run_layout.PLAN
    document = run_layout.read_plan_document(plan_file) if plan_file.is_file() else None
    if document is None:
        raise StorageError(f"{folder}: not a run folder; name the `output` of a recipe that was run")
    plan, result, export = document["plan"], folder / run_layout.RESULT, folder / run_layout.EXPORT
    metrics = tuple(_flat(row) for row in _read_lines(folder / run_layout.METRICS))
    is_exported, is_evaluated = export.is_dir(), result.is_file()
    reached = _result(result)
    return RunResult(
        folder=folder,
        is_finished=is_exported and (is_evaluated or plan["evaluation"] is None),
        num_updates=int(metrics[-1]["update"]) if metrics else 0,
        planned_updates=sum(phase["updates"] for phase in plan["phases"]),
        export=export if is_exported else None,
        accuracies={
            domain: {kind: row.value if row else None for kind, row in reached.headline(domain).items()}
            for domain in reached.suites
        }
        if reached
        else {},
        result=reached,
        metrics=metrics,
        alarms=_alarms(folder / run_layout.ALARMS),
    )


_ALARMS = TypeAdapter(tuple[AlarmRaised, ...])


def _alarms(file: Path) -> tuple[AlarmRaised, ...]:
    try:
        return _ALARMS.validate_python(_read_lines(file))
    except ValidationError as error:
        raise StorageError(f"{file} is damaged: {error}") from error


def _result(path: Path) -> Result | None:
    try:
        return read_result(path)
    except ValueError as error:
        raise StorageError(f"{path} {error}; `mergeopd eval` measures again") from error


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    # A running or killed run may leave its last line incomplete.
    return [_parsed(file, line) for line in lines if line.endswith("\n")]


def _parsed(file: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise StorageError(f"{file}: not JSON: {error}; run the recipe again to repair it") from error
    if not isinstance(value, dict):
        raise StorageError(f"{file}: must hold JSON objects; run the recipe again to repair it")
    return value
