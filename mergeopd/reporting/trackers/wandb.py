"""Weights & Biases: https://docs.wandb.ai/models/runs/resuming."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergeopd.errors import TrackerError
from mergeopd.messages import shown
from mergeopd.recipe.trackers import Wandb
from mergeopd.reporting.events import AlarmRaised
from mergeopd.reporting.trackers.protocol import Opened, Outcome, TrackedRun
from mergeopd.reporting.trackers.values import alarm_texts

_MAX_NAME = 128
_UPLOAD_TIMEOUT_S = 20.0  # shorter than a run's end waits for its trackers


class WandbTracker:
    """Resumes the run with the same id from the last step on the server, and cannot replace earlier steps.

    An offline run cannot be resumed: every process writes a folder of its own, with all updates so far, and
    `wandb sync` of a later one replaces an earlier one.
    """

    title = "W&B"

    def __init__(self, settings: Wandb) -> None:
        self._settings = settings
        self._run: Any = None
        self._alert_level: Any = None

    def start(self, run: TrackedRun) -> Opened:
        """Open the run.

        Raises:
            TrackerError: there is no API key, and wandb would ask for one at the terminal.
        """
        import wandb

        own = self._settings
        # `silent`: wandb prints around the live display; `console`: it would copy that display to the server.
        # The metadata are paths and the command line of this machine.
        options = wandb.Settings(
            silent=True, console="off", x_disable_meta=True, finish_timeout=_UPLOAD_TIMEOUT_S
        )
        setup = wandb.setup(settings=options)
        mode = "offline" if own.offline else setup.settings.mode
        if mode not in ("offline", "disabled", "dryrun") and not wandb.login(prompt=False):
            raise TrackerError(
                "no API key: run `wandb login`, set WANDB_API_KEY, or set `offline: true` of the tracker"
            )
        self._run = wandb.init(
            project=own.project,
            entity=own.entity,
            group=own.group,
            tags=own.tags,
            name=run.name[:_MAX_NAME],
            id=run.id,
            resume="allow",
            config=dict(run.config),
            dir=run.folder,
            mode=mode,
            settings=options,
        )
        self._alert_level = wandb.AlertLevel
        folder = shown(Path(self._run.settings.sync_dir))
        where = f"offline; upload with `wandb sync {folder}`" if mode != "online" else self._run.url
        return Opened(self._run.starting_step - 1, where)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def alert(self, alarm: AlarmRaised) -> None:
        level = self._alert_level.ERROR if alarm.stops else self._alert_level.WARN
        title, text = alarm_texts(alarm)
        self._run.alert(title=title, text=text, level=level)

    def summarize(self, values: Mapping[str, float], verdict: str, step: int) -> None:
        self._run.summary.update({**values, "verdict": verdict})

    def finish(self, outcome: Outcome) -> None:
        if outcome == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if outcome == "finished" else 1)
