"""Read the rows of prompt files and datasets."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mergeopd.config.suggest import closest
from mergeopd.data.messages import RowError
from mergeopd.errors import DataError
from mergeopd.recipe.plan import SourcePlan
from mergeopd.recipe.sources import file_format

_BATCH_ROWS = 4096
_MAX_CSV_FIELD = 2**31 - 1

_CONVERSATIONS = ("messages", "conversations", "conversation")

Row = tuple[int, str, Any]
"""Number (from 0), place and value of a row. The value of an invalid one is its RowError."""


def read_rows(source: SourcePlan, needed: Mapping[str, str], used: Collection[str]) -> Iterator[Row]:
    """Yield the rows of a source, without blank lines.

    Of tables, only the fields of `used` are read; those of `needed` (field: the recipe key that names it)
    must be columns. Raises DataError or OSError if the source is missing or unreadable.
    """
    path = Path(source.source)
    if path.is_dir():
        from mergeopd.data.dataset_rows import open_dataset

        dataset = open_dataset(source)
        check_columns(source.title, dataset.columns, needed)
        rows = dataset.rows(used)
        return ((row, f"{source.title}: row {row}", value) for row, value in enumerate(rows))
    form = file_format(path)
    if form is None:
        raise DataError(f"{path}: not a .jsonl, .json, .csv or .parquet file; convert it to one of them")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; name a file of prompts")
    if form == ".parquet":
        return _parquet_rows(path, needed, used)
    return _text_rows(path, form, needed)


def row_place(source: SourcePlan, row: int) -> str:
    """Return the place of a row: `data/math.jsonl:3`, or `data/math.parquet: row 2`."""
    is_lines = file_format(Path(source.source)) == ".jsonl"
    return f"{source.title}:{row + 1}" if is_lines else f"{source.title}: row {row}"


def source_digest(source: SourcePlan) -> str:
    """Return the SHA-256 of a file, or of the digests of a dataset's files. Raises OSError, DataError."""
    path = Path(source.source)
    if not path.is_dir():
        return _digest(path)
    from mergeopd.data.dataset_rows import open_dataset

    return hashlib.sha256("".join(map(_digest, open_dataset(source).files)).encode()).hexdigest()


def check_columns(title: str, columns: Collection[str], needed: Mapping[str, str]) -> None:
    """Raise DataError for every field of `needed` that is no column."""
    absent = [f"{title}: {missing_field(f, columns, key)}" for f, key in needed.items() if f not in columns]
    if absent:
        raise DataError("\n".join(absent))


def missing_field(field: str, names: Collection[str], key: str) -> str:
    """Return the message for a field that is not among `names`; `key` is the recipe key that names it."""
    near = closest(field, names)
    if near is not None:
        return f"field {field!r} is missing; did you mean {near!r}?"
    if key == "prompt_field" and (whole := [name for name in _CONVERSATIONS if name in names]):
        return f"field {field!r} is missing; `messages_field: {whole[0]}` splits whole conversations"
    listed = ", ".join(map(repr, names)) or "none"
    there = f"there {'is' if len(names) == 1 else 'are'} {listed}"
    return f"field {field!r} is missing ({there}); name the field with `{key}`"


def without_nulls(value: Any) -> Any:
    """Remove null keys of objects: tables have them because all objects of a column share their keys."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def table_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a table; its own fields may be null, those of objects in it are left out then."""
    return {name: without_nulls(value) for name, value in row.items()}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text_rows(path: Path, form: str, needed: Mapping[str, str]) -> Iterator[Row]:
    with _opened(path) as file:
        try:
            if form == ".csv":
                yield from _csv_rows(path, file, needed)
            elif form == ".json" and file.peek(1).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                yield from _json_rows(path, file.read())
            else:
                yield from _jsonl_rows(path, file)
        except (EOFError, zlib.error) as error:
            raise DataError(f"{path}: damaged gzip file ({error}); copy it again") from error


def _opened(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.GzipFile(path) if path.suffix == ".gz" else path.open("rb")


def _jsonl_rows(path: Path, file: Iterable[bytes]) -> Iterator[Row]:
    for row, raw in enumerate(file):
        if b"\0" in raw:
            raise DataError(f"{path}: is not a text file; write one JSON object per line")
        if row == 0:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if raw.strip():
            yield row, f"{path}:{row + 1}", _parse(raw)


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8").rstrip("\r\n"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 (byte {error.start + 1}); save the file as UTF-8")
    except json.JSONDecodeError as error:
        return RowError(f"not JSON: {error.msg} (column {error.colno}); write one JSON object per line")
    except (ValueError, RecursionError) as error:
        return RowError(f"not JSON: {error}")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _json_rows(path: Path, raw: bytes) -> Iterator[Row]:
    """Yield the items of a JSON list."""
    try:
        rows = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON list: {error}") from error
    return ((row, f"{path}: row {row}", value) for row, value in enumerate(rows))


def _csv_rows(
    path: Path, file: gzip.GzipFile | io.BufferedReader, needed: Mapping[str, str]
) -> Iterator[Row]:
    """Yield the rows of a CSV file with a header. Values are text; empty ones are null."""
    csv.field_size_limit(_MAX_CSV_FIELD)
    reader = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
    try:
        check_columns(str(path), reader.fieldnames or (), needed)
        for row, value in enumerate(reader):
            extra, place = value.pop(None, None), f"{path}: row {row}"
            fault = RowError("has more values than the header has names") if extra else None
            yield row, place, fault or {name: text or None for name, text in value.items()}
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable CSV file: {error}; save it as CSV in UTF-8") from error


def _parquet_rows(path: Path, needed: Mapping[str, str], used: Collection[str]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            check_columns(str(path), names, needed)
            columns, row = [name for name in names if name in used], 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                for value in batch.to_pylist():
                    yield row, f"{path}: row {row}", table_row(value)
                    row += 1
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path}: not a readable parquet file: {str(error).removesuffix('.')}; write it again"
        ) from error
