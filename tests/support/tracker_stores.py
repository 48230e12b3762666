"""What trackers stored, read back: values as (step, value) by name, in the order in which they were stored."""

from __future__ import annotations

import json
import sqlite3
import struct
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Values = dict[str, list[tuple[int, float]]]


@dataclass
class Stored:
    """One run in a tracker. `summary` are its last values where a tracker has them apart, `status` its state."""

    values: Values = field(default_factory=lambda: defaultdict(list))
    alerts: list[tuple[str, str]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    status: str = ""


def _wandb_records(path: Path) -> Iterator[Any]:
    """Records of a `.wandb` file: protocol buffers in the log format of LevelDB, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_runs(folder: Path) -> list[Stored]:
    """The offline runs below a run folder, oldest first."""
    runs = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        stored = Stored()
        for record in _wandb_records(path):
            if record.HasField("run"):
                stored.config = {i.key: json.loads(i.value_json) for i in record.run.config.update}
                stored.config["id"] = record.run.run_id
            elif record.HasField("history"):
                for item in record.history.item:
                    if not (name := item.nested_key[0] if item.nested_key else item.key).startswith("_"):
                        stored.values[name].append((record.history.step.num, json.loads(item.value_json)))
            elif record.HasField("alert"):
                stored.alerts.append((record.alert.title, record.alert.text))
            elif record.HasField("summary"):
                for item in record.summary.update:
                    name = item.nested_key[0] if item.nested_key else item.key
                    stored.summary[name] = json.loads(item.value_json)
            elif record.HasField("preempting"):
                stored.status = "preempting"
            elif record.HasField("exit"):
                stored.status = f"{stored.status} {record.exit.exit_code}".strip()
        runs.append(stored)
    return runs


def mlflow_runs(url: str, experiment: str) -> list[Stored]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=url)
    named = client.get_experiment_by_name(experiment)
    assert named is not None
    runs = []
    for run in client.search_runs([named.experiment_id]):
        names = run.data.metrics
        values = {
            n: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, n)] for n in names
        }
        alerts = [(k.removeprefix("alarm."), v) for k, v in run.data.tags.items() if k.startswith("alarm.")]
        runs.append(
            Stored(values, alerts, dict(run.data.params), {**names, **run.data.tags}, run.info.status)
        )
    return runs


def trackio_runs(database: Path) -> list[Stored]:
    runs: dict[str, Stored] = defaultdict(Stored)
    with sqlite3.connect(database) as connection:
        for name, step, metrics in connection.execute(
            "SELECT run_name, step, metrics FROM metrics ORDER BY id"
        ):
            for key, value in json.loads(metrics).items():
                runs[name].values[key].append((step, float(value) if key != "verdict" else value))
        for name, config in connection.execute("SELECT run_name, config FROM configs"):
            runs[name].config = json.loads(config)
        for name, title, text in connection.execute("SELECT run_name, title, text FROM alerts ORDER BY id"):
            runs[name].alerts.append((title, text))
    return list(runs.values())


def tensorboard_run(folder: Path) -> Stored:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensorboard's own
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    values = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    texts = {
        tag.removesuffix("/text_summary"): events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in events.Tags()["tensors"]
    }
    alerts = [(tag.removeprefix("alarm/"), text) for tag, text in texts.items() if tag.startswith("alarm/")]
    return Stored(values, alerts, {}, texts)
