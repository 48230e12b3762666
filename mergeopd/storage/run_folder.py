"""Run folders: paths, the plan they belong to, and start time."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from mergeopd import __version__
from mergeopd.config.locate import dotted
from mergeopd.config.tree import Keys
from mergeopd.errors import StorageError
from mergeopd.messages import shown, shown_in
from mergeopd.recipe.plan import Plan
from mergeopd.storage import run_layout
from mergeopd.storage.failures import named_failures
from mergeopd.storage.folders import is_leftover, newest_number, write_atomic
from mergeopd.storage.lock import LOCK_NAME, exclusive

_SHOWN = 12
_NOTHING = object()


class RunFolder:
    """The folder of one run. File names are in `storage/run_layout.py`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan_file = path / run_layout.PLAN
        self.metrics_file = path / run_layout.METRICS
        self.samples_file = path / run_layout.SAMPLES
        self.teacher_text_file = path / run_layout.TEACHER_TEXT
        self.api_use_file = path / run_layout.API_USE
        self.accuracy_file = path / run_layout.ACCURACY
        self.alarms_file = path / run_layout.ALARMS
        self.spill = path / run_layout.SPILL
        self.weights = path / run_layout.WEIGHTS
        self.servers = path / run_layout.SERVERS
        self.checkpoints = path / run_layout.CHECKPOINTS
        self.export = path / run_layout.EXPORT
        self.best = path / run_layout.BEST
        self.result_file = path / run_layout.RESULT
        self.evaluation = path / run_layout.EVALUATION
        self.report_file = path / run_layout.REPORT

    def started(self) -> datetime | None:
        """Return the start time of the run; None if it has not started."""
        record = self._record()
        return datetime.fromisoformat(record["started"]) if record else None

    def refusal(self, plan: Plan, files: Mapping[str, str], allowed: Sequence[str] = ()) -> str | None:
        """Return why this plan with these files (path: digest) cannot start or resume here, or None.

        `allowed` are the changes declared by the user: dotted keys of the plan (including all keys below) or
        files. A smoke run with other settings is no reason: `set_aside` moves it. Raises StorageError if
        plan.yaml is damaged.
        """
        before = self._record()
        if before is None:
            return self._foreign()
        all_changes = self._changes(before, plan, files)
        changes = _undeclared(all_changes, allowed)
        if changes and self._is_smoke(before):
            return None
        if all_changes and not changes and self.export.exists():
            return (
                f"{shown(self.path)} has exported its student, so its settings can no longer change; "
                "evaluate other settings with mergeopd eval, move the export away to continue training, "
                f"or start over with --fresh, which moves this run to {shown(self._next_aside())}"
            )
        if not changes:
            return None
        listed = "\n".join(f"    {text}" for text in list(changes.values())[:_SHOWN])
        if len(changes) > _SHOWN:
            listed += f"\n    and {len(changes) - _SHOWN} more"
        return (
            f"{shown(self.path)} belongs to a run that started with other settings or files:\n{listed}\n"
            "undo the changes to resume it, declare them with --allow-change KEY, "
            f"start over with --fresh, which moves this run to {shown(self._next_aside())}, "
            "or choose another folder with --set output=..."
        )

    def check(self, plan: Plan, files: Mapping[str, str], allowed: Sequence[str]) -> None:
        """Raise StorageError if `refusal` returns a reason. Writes nothing."""
        refusal = self.refusal(plan, files, allowed)
        if refusal is not None:
            raise StorageError(refusal)

    def is_replaceable(self, plan: Plan, files: Mapping[str, str], allowed: Sequence[str]) -> bool:
        """Whether the folder has a smoke run with settings or files other than those `allowed`."""
        before = self._record()
        if before is None or not self._is_smoke(before):
            return False
        return bool(_undeclared(self._changes(before, plan, files), allowed))

    def set_aside(self) -> Path | None:
        """Move the run to the first free of NAME.1, NAME.2, ... and return its new path; None without a run.

        Raises StorageError for a folder of something else, and while another process uses the run.
        """
        if self._record() is None:
            if (refusal := self._foreign()) is not None:
                raise StorageError(refusal)
            return None
        with exclusive(self.path):
            aside = self._next_aside()
            real = self.path.resolve()  # a link to another disk continues to lead there
            with named_failures("move", real):
                real.rename(aside)
                real.mkdir()
        return aside

    def _next_aside(self) -> Path:
        real = self.path.resolve()
        paths = (real.with_name(f"{real.name}.{number}") for number in itertools.count(1))
        return next(path for path in paths if not os.path.lexists(path))

    def _foreign(self) -> str | None:
        """Return why a folder without plan.yaml cannot be used; None if it is empty or missing."""
        if self.path.is_dir() and any(
            path.name not in (LOCK_NAME, run_layout.CONTROLS, run_layout.INSPECTION) and not is_leftover(path)
            for path in self.path.iterdir()
        ):
            return (
                f"{shown(self.path)} is not empty and not a run folder; choose another with --set output=..."
            )
        return None

    def _is_smoke(self, record: Mapping[str, Any]) -> bool:
        """Whether only `--updates` runs worked here, none of them up to the first regular checkpoint."""
        is_short = newest_number(self.checkpoints) < record["plan"]["checkpoint"]["every"]
        return record.get("smoke_run") is True and is_short and not self.export.exists()

    def _changes(self, before: Mapping[str, Any], plan: Plan, files: Mapping[str, str]) -> dict[str, str]:
        changes = dict(_differences(before["plan"], plan.content))
        # Files that only one of the plans names are differences of the plans.
        for file, digest in before["files"].items():
            if file in files and files[file] != digest:
                changes[shown(Path(file))] = f"{shown(Path(file))} has other contents now"
        return changes

    def claim(
        self,
        plan: Plan,
        files: Mapping[str, str],
        now: datetime,
        allowed: Sequence[str],
        *,
        is_smoke: bool = False,
    ) -> None:
        """Create the folder, or check that it belongs to this plan and these files (path: digest).

        Declared changes are recorded in plan.yaml, and whether all runs so far were smoke runs. Raises
        StorageError if there are other changes.
        """
        self.check(plan, files, allowed)
        before = self._record()
        changes = list(self._changes(before, plan, files).values()) if before else []
        is_smoke = is_smoke and (before is None or before.get("smoke_run") is True)
        if before and not changes and is_smoke == before.get("smoke_run", False):
            return
        document = {
            "mergeopd": __version__,
            "format": run_layout.FORMAT,
            "started": now.isoformat(timespec="seconds"),
            "smoke_run": is_smoke,
            "hash": plan.hash,
            "earlier_hashes": [*before["earlier_hashes"], *([before["hash"]] if changes else [])]
            if before
            else [],
            "declared_changes": [*before["declared_changes"], *changes] if before else [],
            "recipe_file": plan.recipe_file,
            "versions": _versions(),
            "licences": {name: t.licence for name, t in plan.teachers.items() if t.licence is not None},
            "plan": plan.content,
            "files": dict(files),
        }
        text = io.StringIO()
        YAML().dump(document, text)
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.plan_file, text.getvalue())

    def plan_hashes(self) -> list[str]:
        """Return the plan's hash, and its hashes before declared changes."""
        record = self._record()
        return [record["hash"], *record["earlier_hashes"]] if record else []

    def other_files(self, files: Mapping[str, str]) -> list[str]:
        """Return those of `files` (path: digest) that the run recorded with other contents."""
        record = self._record()
        own = record["files"] if record else {}
        return [file for file, digest in files.items() if own.get(file, digest) != digest]

    def _record(self) -> dict[str, Any] | None:
        if not self.plan_file.is_file():
            return None
        record = run_layout.read_plan_document(self.plan_file)
        if record is None or not _is_valid(record):
            raise StorageError(
                f"{shown(self.plan_file)} is damaged or of another version of mergeopd; "
                "choose another folder with --set output=... (once a run has begun there, "
                "the checkpoints of this one can be moved over)"
            )
        return record


def _undeclared(changes: Mapping[str, str], allowed: Sequence[str]) -> dict[str, str]:
    """Return the changes, by key, that `allowed` does not name, nor a key above them."""
    return {
        key: text
        for key, text in changes.items()
        if not any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in allowed)
    }


def _is_valid(record: Mapping[str, Any]) -> bool:
    """Whether plan.yaml is complete and its plan matches its hash."""
    parts = {"started": str, "hash": str, "plan": dict, "files": dict}
    parts |= {"earlier_hashes": list, "declared_changes": list}
    if not all(isinstance(record.get(key), kind) for key, kind in parts.items()):
        return False
    try:
        datetime.fromisoformat(record["started"])
    except ValueError:
        return False
    digest = hashlib.sha256(json.dumps(record["plan"], sort_keys=True).encode()).hexdigest()
    return digest == str(record["hash"])


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _differences(before: Any, now: Any, path: Keys = ()) -> list[tuple[str, str]]:
    """Return `(path, "path: old -> new")` for every leaf that differs; a missing leaf is `nothing`."""
    if before == now:
        return []
    old, new = _parts(before), _parts(now)
    # Parts are compared if both sides have some; otherwise the value was replaced, added or removed.
    if old and new and isinstance(before, dict) == isinstance(now, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            change
            for key in keys
            for change in _differences(old.get(key, _NOTHING), new.get(key, _NOTHING), (*path, key))
        ]
    return [(dotted(path), f"{dotted(path)}: {_short(before)} -> {_short(now)}")]


def _parts(value: Any) -> dict[str | int, Any]:
    if isinstance(value, dict):
        return value
    return dict(enumerate(value)) if isinstance(value, list) else {}


def _short(value: Any, limit: int = 80) -> str:
    if value is _NOTHING:
        return "nothing"
    if isinstance(value, str):
        value = shown_in(value)
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
