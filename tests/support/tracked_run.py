"""A run of four updates as events, for trackers. Its second process repeats the update after the checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from results import result_of

from mergeopd.errors import Stopped
from mergeopd.recipe.plan import Plan
from mergeopd.reporting.events import (
    AccuracyMeasured,
    AlarmRaised,
    DomainStats,
    Event,
    Note,
    PolicyStats,
    RunFinished,
    RunStarted,
    TeacherStats,
    UpdateDone,
)
from mergeopd.reporting.jsonl import RecordsReporter
from mergeopd.reporting.result import Estimate
from mergeopd.reporting.trackers.protocol import Tracker
from mergeopd.reporting.trackers.reporter import TrackersReporter
from mergeopd.storage.metrics import MetricsFile

UPDATE = UpdateDone(
    update=1,
    phase="merge",
    round=0,
    lr=3e-4,
    loss=0.5,
    grad_norm=2.0,
    num_tokens=600,
    on_policy_fraction=1.0,
    teachers={"math": TeacherStats(400, {"reverse_kl": 0.25, "jsd": 0.125}, 0.0625)},
    domains={"math": DomainStats(4, 400, 100.0, 2 / 3, 0.75, 1.5, 0.9, 0.25, 0.5)},
    seconds={"update": 2.0, "rollout": 1.0},
    teacher_bytes_read=4096,
    policy=PolicyStats(0.125, 0.25, 1.5, 0.01, 0.5),
    verifier_failures={"code (2)": 2},
)
ALARM = AlarmRaised(3, "starved", "math", "share 1 %", "responses are short", "raise `share`", stops=False)
RESULT = result_of({"math": {"base": 0.25, "expert/math": 0.75, "merged": 0.5}})
STOPPED = Stopped("stopped by SIGINT")


def update(number: int, loss: float) -> UpdateDone:
    return replace(UPDATE, update=number, loss=loss)


def accuracy(number: int, value: float) -> AccuracyMeasured:
    return AccuracyMeasured(number, {"math": Estimate(value, 0.1, 0.9)}, {"math": 20})


FIRST = (accuracy(0, 0.25), update(1, 0.5), update(2, 0.25), accuracy(2, 0.375), update(3, 0.125), ALARM)
SECOND = (update(3, 9.0), ALARM, update(4, 0.0625), accuracy(4, 0.5))  # resumes after update 2
FINISHED = RunFinished({"total": 3.0}, RESULT)


class Notes:
    """A reporter that keeps the texts of notes."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def emit(self, event: Event) -> None:
        assert isinstance(event, Note)
        self.texts.append(event.text)


def play(
    folder: Path,
    plan: Plan,
    trackers: tuple[Tracker, ...],
    events: Iterable[Event],
    resumed_at: int = 0,
    error: BaseException | None = None,
    finish_timeout_s: float = 60.0,
) -> list[str]:
    """Pass the events of one process, which ends with `error`, to records and trackers; return the notes."""
    folder.mkdir(exist_ok=True)
    names = ("metrics.jsonl", "samples.jsonl", "accuracy.jsonl", "alarms.jsonl")
    notes = Notes()
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(MetricsFile(folder / name)) for name in names]
        for file in files:
            file.truncate_to(resumed_at)
        records = RecordsReporter(*files)
        if error is not None:
            opened.enter_context(pytest.raises(type(error)))
        reporter = TrackersReporter(trackers, plan, folder, notes, finish_timeout_s)
        opened.enter_context(reporter)
        started = RunStarted("x", "x.yaml", 4, (("merge", 4),), ("math",), ("math",), folder, resumed_at)
        for event in (started, *events):
            records.emit(event)
            reporter.emit(event)
        if error is not None:
            raise error
    return notes.texts
