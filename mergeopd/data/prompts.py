"""Read prompt files. All invalid rows are reported together."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mergeopd.data.messages import RowError, checked, kind, read_message, read_tools, tool_names
from mergeopd.errors import DataError
from mergeopd.recipe.plan import SourcePlan
from mergeopd.recipe.verifiers import CombinedVerifier, Verifier, columns_of, needs_reference
from mergeopd.types import Message, Prompt

_SHOWN = 5
_BATCH_ROWS = 4096


def read_prompts(source: SourcePlan, shown: Mapping[str, str] = {}) -> tuple[Prompt, ...]:
    """Read the first `limit` prompts of a .jsonl or .parquet file.

    `shown` maps the fields used by teachers' prompts to one such teacher each; "reference" is the reference,
    independent of the name of its field.

    Keys are `"<source name>:<row>"`, where row counts lines (or parquet rows) from 0. Raises DataError if the
    file is missing, empty or unreadable, or if rows lack a required field or have a wrong type.
    """
    path = Path(source.source)
    row_readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    if path.suffix not in row_readers:
        raise DataError(f"{path}: not a .jsonl or .parquet file; convert it to one of them")
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "there is no such file"
        raise DataError(f"{path}: {kind}; name a file of prompts")
    prompts: list[Prompt] = []
    problems: dict[str, list[str]] = {}  # locations of the rows, by problem
    num_rows = 0
    try:
        for row, place, value in row_readers[path.suffix](path, source, shown):
            if source.limit is not None and num_rows >= source.limit:
                break
            num_rows += 1
            try:
                prompts.append(_prompt(source, row, value, shown))
            except RowError as error:
                problems.setdefault(str(error), []).append(place)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if problems:
        raise DataError(_summary(path, problems, num_rows))
    if not prompts:
        raise DataError(f"{path}: has no prompts; a source needs at least one row")
    return tuple(prompts)


def _summary(path: Path, problems: Mapping[str, list[str]], num_rows: int) -> str:
    """Format the first problems, each with its first row, because all rows often lack the same field."""
    num_bad = sum(map(len, problems.values()))
    lines = [f"{path}: {num_bad} of {num_rows} {'row' if num_rows == 1 else 'rows'} cannot be used"]
    for problem, places in list(problems.items())[:_SHOWN]:
        others = f" and {len(places) - 1} more" if len(places) > 1 else ""
        lines.append(f"  {places[0]}{others}  {problem}")
    rest = sum(len(places) for places in list(problems.values())[_SHOWN:])
    return "\n".join([*lines, f"  and {rest} more"] if rest else lines)


def _jsonl_rows(path: Path, source: SourcePlan, shown: Mapping[str, str]) -> Iterator[tuple[int, str, Any]]:
    """Yield row, place and value of lines that are not blank. The value of an invalid line is its error."""
    with path.open("rb") as file:
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


def _parquet_rows(path: Path, source: SourcePlan, shown: Mapping[str, str]) -> Iterator[tuple[int, str, Any]]:
    """Yield row, place and value of every row; only the source's columns and those in `shown` are read."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            needed = dict([source.main_field])
            needed |= _reference_fields(source.verifier, source.reference_field)
            if "reference" in shown:
                needed[source.reference_field] = "reference_field"
            needed |= {f: f"teachers.{name}.prompt" for f, name in sorted(shown.items()) if f != "reference"}
            absent = [f"{path}: {_missing(f, names, key)}" for f, key in needed.items() if f not in names]
            if absent:
                raise DataError("\n".join(absent))
            used = {*needed, source.reference_field, source.response_field, source.tools_field}
            columns = [name for name in names if name in used]
            row = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                for value in batch.to_pylist():
                    yield (
                        row,
                        f"{path}: row {row}",
                        {key: _without_nulls(item) for key, item in value.items()},
                    )
                    row += 1
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path}: not a readable parquet file: {str(error).removesuffix('.')}; write it again"
        ) from error


def _without_nulls(value: Any) -> Any:
    """Remove the keys of objects that parquet fills with null, because all objects of a column have them."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _prompt(source: SourcePlan, row: int, value: Any, shown: Mapping[str, str]) -> Prompt:
    if isinstance(value, RowError):
        raise value
    if not isinstance(value, dict):
        raise RowError(f"must be a JSON object, not {kind(value)}")
    field, key = source.main_field
    if field not in value:
        raise RowError(_missing(field, list(value), key))
    if source.text_field is not None and not isinstance(value[field], str):
        raise RowError(f"field {field!r} must be text, not {kind(value[field])}")
    tools = read_tools(source.tools_field, value.get(source.tools_field))
    names = tool_names(tools)
    messages = _messages(field, value[field], names)
    reference: str | None
    if source.verifier is not None and needs_reference(source.verifier):
        reference = _reference(source.verifier, source.reference_field, value)
    elif "reference" in shown:
        user = f"the prompt of teacher {shown['reference']!r} needs a reference"
        reference = _required(source.reference_field, value, "reference_field", user)
    else:
        reference = _text(source.reference_field, value)
    return Prompt(
        key=f"{source.name}:{row}",
        source=source.name,
        domain=source.domain,
        messages=messages,
        teachers=source.teachers,
        reference=reference,
        response=None if source.response_field is None else _response(source.response_field, value, names),
        fields={
            field: _required(
                field, value, f"teachers.{teacher}.prompt", f"the prompt of teacher {teacher!r} needs a value"
            )
            for field, teacher in sorted(shown.items())
            if field != "reference"
        },
        tools=tools,
    )


def _reference_fields(verifier: Verifier | None, default: str, key: str = "verifier") -> dict[str, str]:
    """Return the fields that a verifier's reference needs, each with the recipe key that names it."""
    if verifier is None or not needs_reference(verifier):
        return {}
    if isinstance(verifier, CombinedVerifier):
        parts = (
            _reference_fields(each.verifier, each.reference_field or default, f"{key}.of.{i}.verifier")
            for i, each in enumerate(verifier.of)
        )
        return {field: where for part in parts for field, where in part.items()}
    columns = columns_of(verifier) or {"": None}
    return {
        field or default: "reference_field" if field is None else f"{key}.{name}_field"
        for name, field in columns.items()
    }


def _reference(verifier: Verifier, default: str, row: Mapping[str, Any]) -> str | None:
    """Return a verifier's reference: one field as text, or several as a JSON object.

    That of a combination is a JSON list with the reference of each verifier.
    """
    if isinstance(verifier, CombinedVerifier):
        parts = [_reference(each.verifier, each.reference_field or default, row) for each in verifier.of]
        return json.dumps(parts, ensure_ascii=False)
    user = f"verifier {verifier.kind!r} needs a reference"
    fields = _reference_fields(verifier, default)
    if not fields:
        return _text(default, row)
    for field, key in fields.items():
        text = _required(field, row, key, user)
    columns = columns_of(verifier)
    if columns is None:
        return text
    return _text("reference", {"reference": {key: row[field or default] for key, field in columns.items()}})


def _required(field: str, row: Mapping[str, Any], key: str, user: str) -> str:
    """Return the text of a field that `user` needs. `key` is the recipe key that sets the field's name."""
    text = _text(field, row)
    if text is None:
        cause = f"field {field!r} is null" if field in row else _missing(field, list(row), key)
        raise RowError(f"{user}: {cause}")
    return text


def _missing(field: str, names: list[str], key: str) -> str:
    close = difflib.get_close_matches(field, names, n=1)
    if close:
        return f"field {field!r} is missing; did you mean {close[0]!r}?"
    listed = ", ".join(map(repr, names)) or "none"
    there = f"there {'is' if len(names) == 1 else 'are'} {listed}"
    return f"field {field!r} is missing ({there}); name the field with `{key}`"


def _messages(field: str, value: Any, tools: Collection[str]) -> tuple[Message, ...]:
    messages: tuple[Message, ...]
    if isinstance(value, str):
        messages = (Message("user", checked(field, value)),)
    elif isinstance(value, list):
        messages = tuple(read_message(f"{field}[{i}]", item, tools) for i, item in enumerate(value))
    else:
        raise RowError(f"field {field!r} must be text or a list of messages, not {kind(value)}")
    if all(message.is_empty for message in messages):
        raise RowError(f"field {field!r} is an empty prompt")
    if messages[-1].role == "assistant":
        raise RowError(
            f"field {field!r} ends with the assistant's message; a prompt ends before the response"
        )
    return messages


def _response(field: str, row: Mapping[str, Any], tools: Collection[str]) -> str | tuple[Message, ...] | None:
    """Return a text, or the messages of a trajectory; other values are converted to JSON."""
    value = row.get(field)
    if value == []:
        raise RowError(
            f"field {field!r} is an empty list; a trajectory has at least one assistant's message, "
            "and an empty JSON list as a response is the text '[]'"
        )
    if not isinstance(value, list) or not any(
        isinstance(item, Mapping) and ("role" in item or "content" in item) for item in value
    ):
        return _text(field, row)
    turns = tuple(read_message(f"{field}[{i}]", item, tools) for i, item in enumerate(value))
    for i, turn in enumerate(turns):
        if turn.role == "system":
            raise RowError(f"{field}[{i}].role is 'system'; instructions belong to the prompt")
    if turns[0].role != "assistant":
        raise RowError(
            f"{field}[0].role is {turns[0].role!r}; a trajectory begins with the assistant's message, "
            "move earlier messages to the prompt"
        )
    if turns[-1].role != "assistant":
        raise RowError(
            f"{field}[{len(turns) - 1}].role is {turns[-1].role!r}; a trajectory ends with the assistant's "
            "message, remove the messages after it"
        )
    return turns


def _text(field: str, row: Mapping[str, Any]) -> str | None:
    """Return text unchanged, null and a missing field as None, and other values as JSON."""
    value = row.get(field)
    if value is None:
        return None
    if isinstance(value, str):
        return checked(field, value)
    try:
        return checked(field, json.dumps(value, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise RowError(f"field {field!r} cannot be written as JSON: {error}") from error
