"""MLflow: a tracking server, or a local database."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from typing import Any

from mergeopd.recipe.trackers import Mlflow
from mergeopd.reporting.events import AlarmRaised
from mergeopd.reporting.trackers.protocol import NO_STEP, Opened, Outcome, TrackedRun
from mergeopd.reporting.trackers.values import alarm_texts, flat

_RUN_ID = "mergeopd.run"
_MAX_TEXT = 500  # characters of a parameter that all servers accept
_MAX_PARAMS = 100  # of one request
_NOT_IN_NAMES = re.compile(r"[^\w.\- /]")  # a prompt file may have any name
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MlflowTracker:
    """Finds the run again by a tag with its id. Parameters are those of the start; MLflow cannot change them.

    MLflow keeps every value of a step, so steps that it has are not sent again.
    """

    title = "MLflow"

    def __init__(self, settings: Mlflow) -> None:
        self._settings = settings
        self._client: Any = None
        self._run_id = ""

    def start(self, run: TrackedRun) -> Opened:
        # The client has no state outside itself, unlike `mlflow.start_run`.
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):  # they log each table of a new database
            logging.getLogger(name).setLevel(logging.WARNING)
        own = self._settings
        self._client = client = MlflowClient(tracking_uri=own.url)
        experiment = client.get_experiment_by_name(own.experiment)
        number = experiment.experiment_id if experiment else client.create_experiment(own.experiment)
        where = f"run '{run.name}' of experiment '{own.experiment}'"
        if runs := client.search_runs([number], f"tags.`{_RUN_ID}` = '{run.id}'", max_results=1):
            self._run_id = runs[0].info.run_id
            self._log_params(run.config, runs[0].data.params)
            client.update_run(self._run_id, status="RUNNING")
            steps = (value.step for value in client.get_metric_history(self._run_id, "update/num_tokens"))
            return Opened(max(steps, default=NO_STEP), where)
        tags = {**(own.tags or {}), _RUN_ID: run.id}
        self._run_id = client.create_run(number, tags=tags, run_name=run.name).info.run_id
        self._log_params(run.config, {})
        return Opened(NO_STEP, where)

    def _log_params(self, config: Mapping[str, Any], known: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        values = {_named(key): str(value)[:_MAX_TEXT] for key, value in flat(config).items()}
        params = [Param(key, value) for key, value in values.items() if key not in known]
        for start in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(self._run_id, params=params[start : start + _MAX_PARAMS])

    def log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(_named(name), value, now_ms, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def alert(self, alarm: AlarmRaised) -> None:
        title, text = alarm_texts(alarm)
        self._client.set_tag(self._run_id, f"alarm.{title}", f"update {alarm.update}: {text}")

    def summarize(self, values: Mapping[str, float], verdict: str, step: int) -> None:
        self.log(values, step)
        self._client.set_tag(self._run_id, "verdict", verdict)

    def finish(self, outcome: Outcome) -> None:
        self._client.set_terminated(self._run_id, _STATUS[outcome])


def _named(name: str) -> str:
    return _NOT_IN_NAMES.sub("_", name)
