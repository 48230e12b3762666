"""Run folders: whose they are, when they began, whether they are finished."""

from __future__ import annotations

import io
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from ruamel.yaml import YAML

from mergeopd import __version__
from mergeopd.errors import StorageError
from mergeopd.recipe.locate import shown, shown_in
from mergeopd.recipe.plan import UNBOUND, Plan
from mergeopd.report.result import ResultTable
from mergeopd.storage import run_layout
from mergeopd.storage.folders import write_atomic
from mergeopd.storage.lock import LOCK_NAME

_SHOWN = 12
_NOTHING = object()


class RunFolder:
    """The folder of one run; what lies in it is named in `storage/run_layout.py`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan_file = path / run_layout.PLAN
        self.metrics_file = path / run_layout.METRICS
        self.samples_file = path / run_layout.SAMPLES
        self.spill = path / run_layout.SPILL
        self.checkpoints = path / run_layout.CHECKPOINTS
        self.export = path / run_layout.EXPORT
        self.result_file = path / run_layout.RESULT

    def started(self) -> datetime | None:
        """When the run began; None when it has not."""
        record = self._record()
        return datetime.fromisoformat(record["started"]) if record else None

    def refusal(self, plan: Plan, files: Mapping[str, str], allowed: Sequence[str] = ()) -> str | None:
        """Why this plan with these files (path: digest) cannot run here; None when it can begin or go on.

        `allowed` names changes that the user declares: dotted keys of the plan (with all below them) or
        files. Raises StorageError when plan.yaml is damaged.
        """
        before = self._record()
        if before is None:
            if self.path.is_dir() and any(path.name != LOCK_NAME for path in self.path.iterdir()):
                return (
                    f"{shown(self.path)} is not empty and not a run folder; "
                    "choose another with --set output=..."
                )
            return None
        changes = {
            key: text
            for key, text in self._changes(before, plan, files).items()
            if not any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in allowed)
        }
        if not changes:
            return None
        listed = "\n".join(f"    {text}" for text in list(changes.values())[:_SHOWN])
        if len(changes) > _SHOWN:
            listed += f"\n    and {len(changes) - _SHOWN} more"
        return (
            f"{shown(self.path)} belongs to a run that began with other settings or files:\n{listed}\n"
            "undo the changes to go on with it, declare them with --allow-change KEY, "
            "or begin a new run with --set output=..."
        )

    def check(self, plan: Plan, files: Mapping[str, str], allowed: Sequence[str]) -> None:
        """Raise StorageError where `refusal` has a reason; writes nothing."""
        refusal = self.refusal(plan, files, allowed)
        if refusal is not None:
            raise StorageError(refusal)

    def _changes(self, before: Mapping[str, Any], plan: Plan, files: Mapping[str, str]) -> dict[str, str]:
        """What differs from the plan on record, by key or file."""
        changes = dict(_differences(before["plan"], _content(plan)))
        # A file that only one plan names shows in the plan.
        for file, digest in before["files"].items():
            if file in files and files[file] != digest:
                changes[shown(Path(file))] = f"{shown(Path(file))} has other contents now"
        return changes

    def claim(self, plan: Plan, files: Mapping[str, str], now: datetime, allowed: Sequence[str]) -> None:
        """Make the folder, or make sure that it belongs to this plan and to these files (path: digest).

        Declared changes are written down with the plan. Raises StorageError naming what else differs when
        the folder belongs to others.
        """
        self.check(plan, files, allowed)
        before = self._record()
        changes = list(self._changes(before, plan, files).values()) if before else []
        if before and not changes:
            return
        document = {
            "mergeopd": __version__,
            "format": run_layout.FORMAT,
            "started": now.isoformat(timespec="seconds"),
            "hash": plan.hash,
            "earlier_hashes": [*before["earlier_hashes"], before["hash"]] if before else [],
            "declared_changes": [*before["declared_changes"], *changes] if before else [],
            "recipe_file": plan.recipe_file,
            "versions": _versions(),
            "plan": _content(plan),
            "files": dict(files),
        }
        text = io.StringIO()
        YAML().dump(document, text)
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.plan_file, text.getvalue())

    def plan_hashes(self) -> list[str]:
        """The plan's hash and those it had before declared changes."""
        record = self._record()
        return [record["hash"], *record["earlier_hashes"]] if record else []

    def _record(self) -> dict[str, Any] | None:
        """plan.yaml; None when there is none."""
        if not self.plan_file.is_file():
            return None
        record = run_layout.read_plan_document(self.plan_file)
        if record is None or not {"earlier_hashes", "declared_changes"} <= record.keys():
            raise StorageError(
                f"{shown(self.plan_file)} is damaged or of another version of mergeopd; "
                "choose another folder with --set output=..."
            )
        return record

    def is_finished(self, plan: Plan) -> bool:
        """Whether the student was exported and, where the recipe evaluates, measured."""
        return self.export.is_dir() and (plan.evaluation is None or self.result_file.is_file())

    def show_finished(self, console: Console) -> None:
        """Tell that there is nothing left to do, and what came out."""
        console.print(f"This run is finished: {shown(self.path)}", highlight=False)
        if self.result_file.is_file():
            document = json.loads(self.result_file.read_text(encoding="utf-8"))
            console.print(
                ResultTable(
                    document, result_path=Path(shown(self.result_file)), export_path=Path(shown(self.export))
                )
            )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _content(plan: Plan) -> dict[str, Any]:
    """What makes a run what it is: not where the recipe lies and where the run goes."""
    return plan.model_dump(mode="json", exclude=set(UNBOUND))


def _differences(before: Any, now: Any, path: str = "") -> list[tuple[str, str]]:
    """`(path, "path: old -> new")` for every leaf that differs, `nothing` where there is none."""
    if before == now:
        return []
    old, new = _parts(before), _parts(now)
    # Parts are compared where both sides have some; otherwise the whole was replaced, added or removed.
    if old and new and isinstance(before, dict) == isinstance(now, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            change
            for key in keys
            for change in _differences(old.get(key, _NOTHING), new.get(key, _NOTHING), _joined(path, key))
        ]
    return [(path, f"{path}: {_short(before)} -> {_short(now)}")]


def _parts(value: Any) -> dict[str | int, Any]:
    if isinstance(value, dict):
        return value
    return dict(enumerate(value)) if isinstance(value, list) else {}


def _joined(path: str, key: str | int) -> str:
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else key


def _short(value: Any, limit: int = 80) -> str:
    if value is _NOTHING:
        return "nothing"
    if isinstance(value, str):
        value = shown_in(value)
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
