"""Run folders: whose they are, when they began, whether they are finished."""

from __future__ import annotations

import io
import json
import platform
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mergeopd import __version__
from mergeopd.errors import StorageError
from mergeopd.recipe.plan import Plan
from mergeopd.report.result import ResultTable
from mergeopd.storage.folders import write_atomic

FORMAT = 1


class RunFolder:
    """The folder of one run: plan.yaml, metrics.jsonl, texts/, checkpoints/, export/, result.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan_file = path / "plan.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.texts = path / "texts"
        self.checkpoints = path / "checkpoints"
        self.export = path / "export"
        self.result_file = path / "result.json"

    def started(self) -> datetime | None:
        """When the run began; None when it has not."""
        record = self._record()
        return datetime.fromisoformat(record["started"]) if record else None

    def claim(self, plan: Plan, files: Mapping[str, str], now: datetime) -> None:
        """Make the folder, or make sure that it belongs to this plan and to these files (path: digest).

        Raises StorageError naming what differs when it belongs to others.
        """
        content = plan.model_dump(mode="json", exclude={"recipe_file", "output"})
        before = self._record()
        if before:
            changes = _differences(before["plan"], content) + _differences(before["files"], dict(files))
            if changes:
                listed = "\n".join(f"    {change}" for change in changes[:12])
                raise StorageError(
                    f"{self.path} belongs to a run with another plan:\n{listed}\n"
                    "    Undo the change, or choose another folder with --set output=..."
                )
            return
        if self.path.is_dir() and any(self.path.iterdir()):
            raise StorageError(
                f"{self.path} is not empty and not a run folder; choose another with --set output=..."
            )
        document = {
            "mergeopd": __version__,
            "format": FORMAT,
            "started": now.isoformat(timespec="seconds"),
            "hash": plan.hash,
            "recipe_file": plan.recipe_file,
            "versions": _versions(),
            "plan": content,
            "files": dict(files),
        }
        text = io.StringIO()
        YAML().dump(document, text)
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.plan_file, text.getvalue())

    def _record(self) -> dict[str, Any] | None:
        """plan.yaml; None when there is none."""
        if not self.plan_file.is_file():
            return None
        try:
            record = YAML(typ="safe").load(self.plan_file.read_text(encoding="utf-8"))
        except (YAMLError, UnicodeDecodeError):
            record = None
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise StorageError(
                f"{self.plan_file} is damaged or of another version of mergeopd; "
                "choose another folder with --set output=..."
            )
        return record

    def is_finished(self, plan: Plan) -> bool:
        """Whether the student was exported and, where the recipe evaluates, measured."""
        return self.export.is_dir() and (plan.evaluation is None or self.result_file.is_file())

    def show_finished(self, console: Console) -> None:
        """Tell that there is nothing left to do, and what came out."""
        console.print(f"This run is finished: {self.path}", highlight=False)
        if self.result_file.is_file():
            document = json.loads(self.result_file.read_text(encoding="utf-8"))
            console.print(ResultTable(document, result_path=self.result_file, export_path=self.export))


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    """`path: old -> new` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted(before.keys() | now.keys(), key=str)
            for line in _differences(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [
            line
            for i, (old, new) in enumerate(zip(before, now, strict=True))
            for line in _differences(old, new, f"{path}[{i}]")
        ]
    return [] if before == now else [f"{path}: {before!r} -> {now!r}"]
