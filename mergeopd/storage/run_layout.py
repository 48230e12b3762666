"""File names in a run folder, and reading plan.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mergeopd.errors import StorageError
from mergeopd.recipe import controls
from mergeopd.storage.failures import named_failures

FORMAT = 1
PLAN = "plan.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "rollouts/samples.jsonl"
TEACHER_TEXT = "rollouts/teacher_text.jsonl"
SELECTION = "rollouts/selection.jsonl"
API_USE = "api_use.jsonl"
ACCURACY = "accuracy.jsonl"
ALARMS = "alarms.jsonl"
SPILL = "spill"
WEIGHTS = "weights"
SERVERS = "servers"
CHECKPOINTS = "checkpoints"
EXPORT = "export"
BEST = "best"
RESULT = "result.json"
EVALUATION = "evaluation"
REPORT = "report.html"
TENSORBOARD = "tensorboard"
TRACKED_RUN = "tracked_run"
CONTROLS = controls.FOLDER
INSPECTION = "inspect"  # may be there before the run begins, as controls may
INSPECTION_DATA = "inspect.json"
INSPECTION_PAGE = "inspect.html"
CONTRIBUTION_DATA = "contribution.json"
CONTRIBUTION_PAGE = "contribution.html"


def read_plan_document(path: Path) -> dict[str, Any] | None:
    """Read plan.yaml as plain data; None if it is not a plan (truncated, not YAML, incomplete).

    Raises StorageError if the plan has another format version, or reading fails.
    """
    with named_failures("read", path):
        content = path.read_bytes()
    try:
        document = YAML(typ="safe").load(content.decode("utf-8"))
    except (YAMLError, UnicodeDecodeError):
        return None
    if not isinstance(document, dict) or "format" not in document:
        return None
    if document["format"] != FORMAT:
        raise StorageError(
            f"{path} has format {document['format']!r}, and this version of mergeopd reads {FORMAT}; "
            f"use mergeopd {document.get('mergeopd', 'of the version that made it')} on this folder, "
            "or another folder"
        )
    return document if {"started", "hash", "plan", "files"} <= document.keys() else None
