"""A run folder as the report sees it: what is there is read strictly, what is not is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mergeopd.errors import StorageError
from mergeopd.storage import run_layout
from mergeopd.storage.failures import named_failures

_SHOWN_OF_PLAN = {"name", "student", "teachers", "phases"}


class _Line(BaseModel):
    """Keys of later versions of the same format are let be."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Cost(_Line):
    """What an update took."""

    seconds: dict[str, float]
    tokens_per_s: float | None
    teacher_bytes_read: int


class Update(_Line):
    """A line of metrics.jsonl. None stands for numbers that were not finite or not measured."""

    update: int
    phase: str
    lr: float | None
    loss: float | None
    grad_norm: float | None
    num_tokens: int
    on_policy_fraction: float | None
    teachers: dict[str, dict[str, float | None]]
    domains: dict[str, dict[str, float | None]]
    policy: dict[str, float | None] = {}
    cost: Cost


class Trace(_Line):
    """One teacher on one sampled answer; one number per token, `masked` positions that do not count."""

    divergence: tuple[float | None, ...]
    logprob_T: tuple[float | None, ...]
    masked: tuple[int, ...]


class Sample(_Line):
    """A line of rollouts/samples.jsonl."""

    update: int
    phase: str
    domain: str
    origin: str
    finish: str
    reward: float | None
    prompt: str
    tokens: tuple[str, ...]
    trained: tuple[bool, ...] | None = None
    logprob_S: tuple[float | None, ...]
    divergence: str
    teachers: dict[str, Trace]

    @model_validator(mode="after")
    def _one_number_per_token(self) -> Sample:
        rows: list[tuple[object, ...]] = [self.logprob_S]
        if self.trained is not None:
            rows.append(self.trained)
        rows += [row for trace in self.teachers.values() for row in (trace.divergence, trace.logprob_T)]
        if any(len(row) != len(self.tokens) for row in rows):
            raise ValueError("other numbers of tokens and values")
        return self


class Result(_Line):
    """result.json."""

    domains: dict[str, dict[str, float | None]]
    mean_recovered: float | None
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class RunData:
    """What a run folder holds. `document` is plan.yaml; `notes` tell what is missing or damaged."""

    folder: Path
    document: Mapping[str, Any] | None
    updates: tuple[Update, ...]
    samples: tuple[Sample, ...]
    result: Result | None
    exported: bool
    notes: tuple[str, ...]

    @property
    def plan(self) -> Mapping[str, Any]:
        """The resolved recipe; empty where plan.yaml could not be read."""
        return self.document["plan"] if self.document else {}

    @property
    def num_updates(self) -> int | None:
        """Updates of the whole plan; None where it could not be read."""
        phases = self.plan.get("phases")
        return sum(phase["updates"] for phase in phases) if phases else None

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to do for `mergeopd run`."""
        return self.exported and (self.result is not None or not self.plan.get("evaluation"))


def load_run(folder: Path) -> RunData:
    """Read a run folder, running or finished.

    Raises:
        StorageError: there is no such run folder, it is of another format version, or the disk refuses.
    """
    _check_is_run(folder)
    notes: list[str] = []
    document = _document(folder / run_layout.PLAN, notes)
    updates = _in_order(_lines(folder / run_layout.METRICS, Update, notes), notes)
    samples = _lines(folder / run_layout.SAMPLES, Sample, notes)
    result = _result(folder / run_layout.RESULT, notes)
    exported = (folder / run_layout.EXPORT).is_dir()
    if not updates:
        if exported or result is not None:
            notes.append(f"{run_layout.METRICS} holds no update, although the run is past its last one")
        else:
            notes.append("no update has been made yet: there are no curves")
    elif not samples:
        notes.append(f"{run_layout.SAMPLES} is missing or empty: no answers can be shown")
    if exported and result is None and document is not None and document["plan"].get("evaluation"):
        notes.append(
            f"{run_layout.RESULT} is not there yet; unless the run is at it, `mergeopd run` goes on with it"
        )
    return RunData(folder, document, updates, samples, result, exported, tuple(notes))


def _check_is_run(folder: Path) -> None:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise StorageError(f"{folder}: {what}; name a run folder, that is the `output` of a recipe")
    parts = (run_layout.PLAN, run_layout.METRICS, run_layout.RESULT)
    if not any((folder / part).exists() for part in parts):
        raise StorageError(
            f"{folder}: is no run folder, it has none of {', '.join(parts)}; "
            "name the `output` of a recipe that was run"
        )


def _document(path: Path, notes: list[str]) -> dict[str, Any] | None:
    fault = "is missing"
    if path.is_file():
        document = run_layout.read_plan_document(path)
        plan = document["plan"] if document is not None else None
        if isinstance(plan, dict) and plan.keys() >= _SHOWN_OF_PLAN:
            return document
        fault = "is damaged"
    notes.append(f"{path.name} {fault}: recipe, phases and versions cannot be shown")
    return None


_Record = TypeVar("_Record", bound=_Line)


def _lines(path: Path, kind: type[_Record], notes: list[str]) -> tuple[_Record, ...]:
    """The sound lines of a JSON lines file; none where there is no file."""
    if not path.is_file():
        return ()
    with named_failures("read", path):
        lines = path.read_bytes().splitlines(keepends=True)
    records: list[_Record] = []
    for number, line in enumerate(lines, start=1):
        torn = number == len(lines) and not line.endswith(b"\n")
        try:
            if not torn:
                records.append(kind.model_validate_json(line))
                continue
        except ValidationError:
            pass
        name = path.relative_to(path.parents[1]) if path.parent.name == "rollouts" else path.name
        notes.append(
            f"{name}: the last line is torn and left out"
            if torn
            else f"{name}: line {number} is damaged and left out"
        )
    return tuple(records)


def _in_order(updates: tuple[Update, ...], notes: list[str]) -> tuple[Update, ...]:
    """By number, the last line of each."""
    numbered = {update.update: update for update in updates}
    ordered = tuple(numbered[number] for number in sorted(numbered))
    if ordered != updates:
        notes.append(
            f"{run_layout.METRICS}: updates are out of order or repeated; the last line of each counts"
        )
    return ordered


def _result(path: Path, notes: list[str]) -> Result | None:
    if not path.is_file():
        return None
    with named_failures("read", path):
        content = path.read_bytes()
    try:
        return Result.model_validate_json(content)
    except ValidationError:
        notes.append(f"{path.name} is damaged: the result cannot be shown; `mergeopd eval` measures again")
        return None
