"""What lies where in a run folder, and how plan.yaml is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mergeopd.errors import StorageError
from mergeopd.storage.failures import named_failures

FORMAT = 1
PLAN = "plan.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "rollouts/samples.jsonl"
SPILL = "spill"
CHECKPOINTS = "checkpoints"
EXPORT = "export"
RESULT = "result.json"
REPORT = "report.html"
TENSORBOARD = "tensorboard"


def read_plan_document(path: Path) -> dict[str, Any] | None:
    """plan.yaml as plain data; None where it is no plan at all (torn, not YAML, without its parts).

    Raises:
        StorageError: it is a plan of another format version, or the disk refuses.
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
