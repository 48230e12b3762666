"""Runs in this process whose events are kept, and which end as by a crash after a chosen update."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.build import build
from mergeopd.engine.clock import Clock
from mergeopd.engine.interrupt import Interrupt
from mergeopd.engine.models import Machine, load_models
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.events import Event, UpdateDone
from mergeopd.storage.run_folder import RunFolder


class Crash(BaseException):
    """Replaces a failure of the machine."""


class Recorder:
    """Reporter that keeps the events and raises Crash after `stop_after` updates."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.events: list[Event] = []
        self._stop_after = stop_after

    def emit(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, UpdateDone) and event.update == self._stop_after:
            raise Crash

    @property
    def updates(self) -> list[UpdateDone]:
        return [e for e in self.events if isinstance(e, UpdateDone)]


def run_recorded(recipe: Path, device: torch.device, *overrides: str, recorder: Recorder) -> RunFolder:
    """Run a recipe or resume it until its end or the recorder's crash; its folder."""
    inputs = preflight(recipe, overrides)
    folder = RunFolder(Path(inputs.plan.output))
    folder.claim(inputs.plan, inputs.files, inputs.now, ())
    models = load_models(inputs, Machine(device, SingleProcess()))
    record = models.checkpoints().restore(folder.plan_hashes(), recorder)
    clock = Clock()
    clock.continue_from(record.seconds)
    with contextlib.suppress(Crash):
        build(models, reporter=recorder, clock=clock, interrupt=Interrupt()).run(record.progress, None)
    return folder
