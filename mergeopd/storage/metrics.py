"""Append-only JSON lines with an `update` each, cut back to the checkpoint when a run resumes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from mergeopd.errors import StorageError
from mergeopd.storage.failures import named_failures
from mergeopd.storage.folders import write_atomic

_DAMAGED = math.inf


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Serialise plain data to standard JSON; NaN and infinities become null.

    Finite floats are exact when read back.
    """
    return json.dumps(_finite(value), allow_nan=False, ensure_ascii=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value


class MetricsFile:
    """Append-only JSON lines, each with an integer `update` and flushed at once. A context manager.

    The file is opened when the first line is appended.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line. `record` needs an integer `update`. Raises StorageError if writing fails."""
        line = json_text({"update": int(record["update"]), **record}) + "\n"
        with named_failures("write", self._path):
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a", encoding="utf-8", newline="")
            self._file.write(line)
            self._file.flush()

    def sync(self) -> None:
        """Sync all lines to the disk. Called before a checkpoint, which must not be ahead of its metrics.

        Raises StorageError if writing fails.
        """
        if self._file is not None:
            with named_failures("write", self._path):
                os.fsync(self._file.fileno())

    def truncate_to(self, update: int) -> int:
        """Drop lines of updates after `update` and an incomplete last line; return how many remain.

        Raises StorageError if a line before the cut is damaged, or writing fails.
        """
        self.close()
        with named_failures("read", self._path):
            content = self._path.read_bytes() if self._path.exists() else b""
        lines = content.splitlines(keepends=True)
        # Damaged lines count as later updates: they are dropped at the end and rejected before it.
        updates = [_update_of(line) for line in lines]
        kept = max((i for i, number in enumerate(updates, start=1) if number <= update), default=0)
        for i, number in enumerate(updates[:kept], start=1):
            if number > update:
                later = f"belongs to update {number}, but earlier ones follow"
                fault = "is damaged" if number == _DAMAGED else later
                raise StorageError(
                    f"cannot resume with {self._path}: line {i} {fault}; "
                    "correct or remove that line, then run the same command again"
                )
        if kept < len(lines):
            write_atomic(self._path, b"".join(lines[:kept]).decode())
        return kept

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._file is not None:
            file, self._file = self._file, None
            with named_failures("write", self._path):
                file.close()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _update_of(line: bytes) -> float:
    """Parse the line's `update`; `_DAMAGED` if it is incomplete (no newline, not JSON, no such key)."""
    try:
        value = json.loads(line)["update"] if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError):
        value = None
    return value if isinstance(value, int) else _DAMAGED
