"""Files with a record per line, as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import TypeAdapter, ValidationError

from mergeopd.storage.failures import named_failures
from mergeopd.storage.folders import write_atomic
from mergeopd.storage.metrics import json_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")


def read_records(path: Path, record: TypeAdapter[T]) -> tuple[T, ...]:
    """Read the file, if it is there; damaged lines are left out. Raises StorageError if the disk fails."""
    if not path.is_file():
        return ()
    with named_failures("read", path):
        lines = path.read_bytes().splitlines()
    rows = []
    for line in lines:
        with suppress(ValidationError):
            rows.append(record.validate_json(line))
    return tuple(rows)


def write_records(path: Path, rows: Iterable[DataclassInstance]) -> None:
    """Write all records. Raises StorageError if the disk fails."""
    write_atomic(path, "".join(json_text(asdict(row)) + "\n" for row in rows))
