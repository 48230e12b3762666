"""Trackio: a local database, a Space of the Hugging Face hub, or an own server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergeopd.recipe.trackers import Trackio
from mergeopd.reporting.events import AlarmRaised
from mergeopd.reporting.trackers.protocol import NO_STEP, Opened, Outcome, TrackedRun
from mergeopd.reporting.trackers.values import alarm_texts


class TrackioTracker:
    """Resumes a run by its name, which therefore ends in the run's id.

    Trackio keeps every value of a step, so steps that it has are not sent again.
    """

    title = "Trackio"

    def __init__(self, settings: Trackio) -> None:
        self._settings = settings
        self._run: Any = None
        self._alert_level: Any = None

    def start(self, run: TrackedRun) -> Opened:
        import trackio
        from trackio import run as trackio_run
        from trackio import utils as trackio_utils

        # It prints about itself in the midst of the live display, and has no setting for that.
        for module in (trackio, trackio_run, trackio_utils):
            vars(module)["print"] = lambda *_, **__: None
        own = self._settings
        name = f"{run.name}-{run.id}"
        self._run = trackio.init(
            project=own.project,
            name=name,
            group=own.group,
            config=dict(run.config),
            resume="allow",
            embed=False,
        )
        self._alert_level = trackio.AlertLevel
        # There is no public attribute; of a new run, the next step is 0.
        last_step = self._run._next_step - 1
        return Opened(max(last_step, NO_STEP), f"run '{name}'; trackio show --project {own.project}")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def alert(self, alarm: AlarmRaised) -> None:
        level = self._alert_level.ERROR if alarm.stops else self._alert_level.WARN
        title, text = alarm_texts(alarm)
        self._run.alert(title=title, text=text, level=level, step=alarm.update)

    def summarize(self, values: Mapping[str, float], verdict: str, step: int) -> None:
        self._run.log({**values, "verdict": verdict}, step=step)

    def finish(self, outcome: Outcome) -> None:
        self._run.finish()
