"""Contents of a run folder for the report; missing or damaged files become notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from mergeopd.errors import StorageError
from mergeopd.reporting.events import AccuracyMeasured, AlarmRaised, RolloutSampled
from mergeopd.reporting.jsonl import UpdateRecord
from mergeopd.reporting.result import Result, read_result
from mergeopd.storage import run_layout
from mergeopd.storage.chat_replies import ApiUse, read_use
from mergeopd.storage.failures import named_failures
from mergeopd.storage.responses import EvaluatedResponse, read_responses
from mergeopd.storage.selection import SelectedPrompt, SelectedShare, selected_shares
from mergeopd.storage.teacher_text import GradedText, KeptShare, kept_shares

_SHOWN_OF_PLAN = {"name", "student", "teachers", "phases"}
# Keys of later versions of the same format are ignored.
_UPDATE = TypeAdapter(UpdateRecord)
_SAMPLE = TypeAdapter(RolloutSampled)
_ACCURACY = TypeAdapter(AccuracyMeasured)
_ALARM = TypeAdapter(AlarmRaised)
_GRADED = TypeAdapter(GradedText)
_SELECTED = TypeAdapter(SelectedPrompt)
_Record = TypeVar("_Record")


@dataclass(frozen=True, slots=True)
class RunData:
    """Contents of a run folder.

    `document` is plan.yaml, `responses` are the evaluated ones of merged student, base and experts, by model
    key; `notes` list what is missing or damaged; `text_kept` is what phases with `keep` have left of the
    teachers' text, `api_use` what teachers behind APIs have counted, `selected` what phases with `select`
    have left of their prompts.
    """

    folder: Path
    document: Mapping[str, Any] | None
    updates: tuple[UpdateRecord, ...]
    samples: tuple[RolloutSampled, ...]
    accuracy: tuple[AccuracyMeasured, ...]
    alarms: tuple[AlarmRaised, ...]
    result: Result | None
    responses: Mapping[str, Sequence[EvaluatedResponse]]
    exported: bool
    notes: tuple[str, ...]
    text_kept: tuple[KeptShare, ...] = ()
    api_use: tuple[ApiUse, ...] = ()
    selected: tuple[SelectedShare, ...] = ()

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
        """Whether the run is complete: exported and, if the recipe has an evaluation, evaluated."""
        return self.exported and (self.result is not None or not self.plan.get("evaluation"))


def load_run(folder: Path) -> RunData:
    """Read a run folder, running or finished.

    Raises:
        StorageError: there is no such run folder, it is of another format version, or the disk refuses.
    """
    _check_is_run(folder)
    notes: list[str] = []
    document = _document(folder / run_layout.PLAN, notes)
    updates = _in_order(_lines(folder, run_layout.METRICS, _UPDATE, notes), notes)
    samples = _lines(folder, run_layout.SAMPLES, _SAMPLE, notes)
    accuracy = _lines(folder, run_layout.ACCURACY, _ACCURACY, notes)
    alarms = _lines(folder, run_layout.ALARMS, _ALARM, notes)
    result = None
    try:
        result = read_result(folder / run_layout.RESULT)
    except ValueError as error:
        fault = f"{run_layout.RESULT} {error}: the result cannot be shown"
        notes.append(f"{fault}; `mergeopd eval` measures again")
    exported = (folder / run_layout.EXPORT).is_dir()
    if not updates:
        if exported or result is not None:
            notes.append(f"{run_layout.METRICS} has no updates, although training is finished")
        else:
            notes.append("no update has been made yet: there are no curves")
    elif not samples:
        notes.append(f"{run_layout.SAMPLES} is missing or empty: no responses can be shown")
    if exported and result is None and document is not None and document["plan"].get("evaluation"):
        notes.append(
            f"{run_layout.RESULT} is missing: the evaluation is running, or `mergeopd run` resumes with it"
        )
    responses = {} if result is None else _responses(folder / run_layout.EVALUATION, result, notes)
    text_kept = kept_shares(_lines(folder, run_layout.TEACHER_TEXT, _GRADED, notes))
    return RunData(
        folder,
        document,
        updates,
        samples,
        accuracy,
        alarms,
        result,
        responses,
        exported,
        tuple(notes),
        text_kept,
        read_use(folder / run_layout.API_USE),
        selected_shares(_lines(folder, run_layout.SELECTION, _SELECTED, notes)),
    )


def _responses(folder: Path, result: Result, notes: list[str]) -> dict[str, Sequence[EvaluatedResponse]]:
    """Read the responses of every model that is shown beside the merged student; older runs have none."""
    responses: dict[str, Sequence[EvaluatedResponse]] = {}
    experts = [row.expert for row in result.suites.values() if row.expert]
    for key in dict.fromkeys(("merged", "base", *experts)):
        path = folder / f"{key.replace('/', '-')}.parquet"
        try:
            if path.is_file():
                responses[key] = read_responses(path)
        except ValueError:
            notes.append(f"{path.parent.name}/{path.name} is damaged: its responses cannot be shown")
    return responses


def _check_is_run(folder: Path) -> None:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise StorageError(f"{folder}: {what}; name a run folder, that is the `output` of a recipe")
    parts = (run_layout.PLAN, run_layout.METRICS, run_layout.RESULT)
    if not any((folder / part).exists() for part in parts):
        raise StorageError(
            f"{folder}: not a run folder, it has none of {', '.join(parts)}; "
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


def _lines(folder: Path, name: str, kind: TypeAdapter[_Record], notes: list[str]) -> tuple[_Record, ...]:
    """Return the valid lines of a JSON lines file; none without a file."""
    path = folder / name
    if not path.is_file():
        return ()
    with named_failures("read", path):
        lines = path.read_bytes().splitlines(keepends=True)
    records: list[_Record] = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith(b"\n"):
            notes.append(f"{name}: the last line is incomplete and left out")
            continue
        try:
            records.append(kind.validate_json(line))
        except ValidationError:
            notes.append(f"{name}: line {number} is damaged and left out")
    return tuple(records)


def _in_order(updates: tuple[UpdateRecord, ...], notes: list[str]) -> tuple[UpdateRecord, ...]:
    """Sort updates by number, keeping the last line of each."""
    numbered = {update.update: update for update in updates}
    ordered = tuple(numbered[number] for number in sorted(numbered))
    if ordered != updates:
        notes.append(
            f"{run_layout.METRICS}: updates are out of order or repeated; the last line of each counts"
        )
    return ordered
