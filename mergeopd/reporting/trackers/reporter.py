"""Pass the events of a run to its trackers, each in a thread of its own.

A tracker may wait for a network for minutes, and raise whatever its package raises. Neither delays or ends
the run: a tracker that fails is left out from there on, with a note, and metrics.jsonl has everything.

A tracker names the last update that it keeps. Later updates that the run folder has already are read from
there: those of a process in which the tracker failed or was not configured yet, or all of them where a
tracker starts a new run. Updates that the tracker has already, because they came after the last checkpoint
of an interrupted process, are left out when they are repeated. So each update is there once.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from queue import Empty, SimpleQueue
from textwrap import shorten
from types import TracebackType

from mergeopd.errors import Stopped
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.trackers import Tracker as Settings
from mergeopd.reporting.events import (
    AccuracyMeasured,
    AlarmRaised,
    Event,
    Note,
    Reporter,
    RunFinished,
    RunStarted,
    UpdateDone,
)
from mergeopd.reporting.jsonl import UpdateRecord
from mergeopd.reporting.page.run_data import load_run
from mergeopd.reporting.trackers.mlflow import MlflowTracker
from mergeopd.reporting.trackers.protocol import Outcome, TrackedRun, Tracker
from mergeopd.reporting.trackers.tensorboard import TensorBoardTracker
from mergeopd.reporting.trackers.trackio import TrackioTracker
from mergeopd.reporting.trackers.values import accuracy_values, config_values, result_values, update_values
from mergeopd.reporting.trackers.wandb import WandbTracker
from mergeopd.storage import run_layout
from mergeopd.storage.failures import named_failures
from mergeopd.storage.folders import write_atomic

FINISH_TIMEOUT_S = 30.0
"""How long the end of a run waits for all trackers together."""

_TRACKERS: Mapping[str, Callable[..., Tracker]] = {
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
    "trackio": TrackioTracker,
    "tensorboard": TensorBoardTracker,
}
_Record = UpdateRecord | AccuracyMeasured | AlarmRaised


def trackers_of(settings: tuple[Settings, ...]) -> tuple[Tracker, ...]:
    """Build the trackers of a recipe; none imports its package before it starts."""
    return tuple(_TRACKERS[own.kind](own) for own in settings)


class TrackersReporter:
    """Passes events to trackers; a context manager, whose end waits for them.

    Trackers start with the run, so an earlier failure leaves no trace in them.
    """

    def __init__(
        self,
        trackers: tuple[Tracker, ...],
        plan: Plan,
        folder: Path,
        notes: Reporter,
        finish_timeout_s: float = FINISH_TIMEOUT_S,
    ) -> None:
        self._trackers = trackers
        self._plan = plan
        self._folder = folder
        self._notes = notes
        self._finish_timeout_s = finish_timeout_s
        self._threads: tuple[_TrackerThread, ...] = ()
        self._is_finished = False

    def emit(self, event: Event) -> None:
        """Pass an event on without waiting, and report what happened to the trackers meanwhile."""
        match event:
            case RunStarted():
                self._start(event)
            case UpdateDone():
                self._put(UpdateRecord.of(event))
            case AccuracyMeasured() | AlarmRaised():
                self._put(event)
            case RunFinished():
                self._is_finished = True
                self._put(event)
            case _:
                return
        self._report()

    def _start(self, event: RunStarted) -> None:
        run = TrackedRun(
            _run_id(self._folder / run_layout.TRACKED_RUN),
            event.name,
            self._folder,
            config_values(self._plan),
            event.resumed_at,
        )
        self._threads = tuple(_TrackerThread(tracker, run) for tracker in self._trackers)
        for thread in self._threads:
            thread.start()

    def _put(self, item: _Record | RunFinished) -> None:
        for thread in self._threads:
            if thread.is_alive():
                thread.inbox.put(item)

    def _report(self) -> None:
        for thread in self._threads:
            for text in thread.new_messages():
                self._notes.emit(Note(text))

    def __enter__(self) -> TrackersReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        outcome: Outcome = "finished"
        if not self._is_finished:
            outcome = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
        for thread in self._threads:
            thread.inbox.put(outcome)
        deadline = time.monotonic() + self._finish_timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._report()
        for thread in self._threads:
            if thread.is_alive():
                waited = f"not done after {self._finish_timeout_s:.0f} s, so its last updates may be missing"
                self._notes.emit(Note(f"{thread.tracker.title}: {waited}; metrics.jsonl has them"))


class _TrackerThread(threading.Thread):
    """Makes all calls of one tracker. A daemon, so that it cannot keep the process from ending."""

    def __init__(self, tracker: Tracker, run: TrackedRun) -> None:
        super().__init__(name=f"tracker {tracker.title}", daemon=True)
        self.tracker = tracker
        self.inbox: SimpleQueue[_Record | RunFinished | Outcome] = SimpleQueue()
        self._run = run
        self._messages: SimpleQueue[str] = SimpleQueue()
        self._last_step = run.resumed_at

    def run(self) -> None:
        try:
            self._serve()
        except Exception as error:  # noqa: BLE001 - packages raise anything, and the run continues without
            cause = shorten(str(error), 300, placeholder=" ...") or type(error).__name__
            self._messages.put(f"{self.tracker.title} gets no more of this run: {cause}")

    def new_messages(self) -> Iterator[str]:
        """Yield messages for the user that were not yielded before."""
        while True:
            try:
                yield self._messages.get_nowait()
            except Empty:
                return

    def _serve(self) -> None:
        opened = self.tracker.start(self._run)
        self._messages.put(f"{self.tracker.title}: {opened.where}")
        for record in _missing(self._run, opened.last_step):
            self._log(record)
        while not isinstance(item := self.inbox.get(), str):
            if isinstance(item, RunFinished):
                if item.result is not None:
                    values = result_values(item.result)
                    self.tracker.summarize(values, item.result.verdict, self._last_step)
            elif item.update > opened.last_step:
                self._log(item)
        self.tracker.finish(item)

    def _log(self, record: _Record) -> None:
        self._last_step = record.update
        match record:
            case UpdateRecord():
                self.tracker.log(update_values(record), record.update)
            case AccuracyMeasured():
                self.tracker.log(accuracy_values(record), record.update)
            case AlarmRaised():
                self.tracker.alert(record)


def _missing(run: TrackedRun, last_step: int) -> list[_Record]:
    """Return the records of updates that were done before, but are not in the tracker."""
    if last_step >= run.resumed_at or not run.resumed_at:
        return []
    data = load_run(run.folder)
    records: list[_Record] = [*data.updates, *data.accuracy, *data.alarms]
    # Sorting keeps the order of an update's own records.
    return sorted(
        (record for record in records if last_step < record.update <= run.resumed_at),
        key=lambda record: record.update,
    )


def _run_id(path: Path) -> str:
    """Return the id of the run, which is drawn when the run starts."""
    with named_failures("read", path):
        known = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    if not known:
        known = secrets.token_hex(6)
        write_atomic(path, f"{known}\n")
    return known
