"""Read prompts. All invalid rows are reported together."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from mergeopd.data.conversations import split_conversation
from mergeopd.data.messages import RowError, checked, kind, read_message, read_tools, tool_names
from mergeopd.data.rows import missing_field, read_rows
from mergeopd.errors import DataError
from mergeopd.recipe.plan import SourcePlan
from mergeopd.recipe.verifiers import CombinedVerifier, Verifier, columns_of, needs_reference
from mergeopd.types import Message, Prompt

_SHOWN = 5
_AFTER_PROMPT = "messages after the user's last one"


def read_prompts(source: SourcePlan, shown: Mapping[str, str] = {}) -> tuple[Prompt, ...]:
    """Read the first `limit` prompts of a source.

    `shown` maps the fields used by teachers' prompts to one such teacher each; "reference" is the reference,
    independent of the name of its field.

    Keys are `"<source name>:<row>"`, where row counts lines (or rows of a table) from 0. Raises DataError if
    the source is missing, empty or unreadable, or if rows lack a required field or have a wrong type.
    """
    prompts: list[Prompt] = []
    problems: dict[str, list[str]] = {}  # locations of the rows, by problem
    num_rows = 0
    needed = dict([source.main_field])
    needed |= _reference_fields(source.verifier, source.reference_field)
    if "reference" in shown:
        needed[source.reference_field] = "reference_field"
    needed |= {f: f"teachers.{name}.prompt" for f, name in sorted(shown.items()) if f != "reference"}
    used = {*needed, source.reference_field, source.response_field or "", source.tools_field}
    try:
        for row, place, value in read_rows(source, needed, used):
            if source.limit is not None and num_rows >= source.limit:
                break
            num_rows += 1
            try:
                prompts.append(_prompt(source, row, value, shown))
            except RowError as error:
                problems.setdefault(str(error), []).append(place)
    except OSError as error:
        raise DataError(f"{source.title}: cannot be read: {error.strerror or error}") from error
    if problems:
        raise DataError(_summary(source.title, problems, num_rows))
    if not prompts:
        raise DataError(f"{source.title}: has no prompts; a source needs at least one row")
    return tuple(prompts)


def _summary(title: str, problems: Mapping[str, list[str]], num_rows: int) -> str:
    """Format the first problems, each with its first row, because all rows often lack the same field."""
    num_bad = sum(map(len, problems.values()))
    lines = [f"{title}: {num_bad} of {num_rows} {'row' if num_rows == 1 else 'rows'} cannot be used"]
    for problem, places in list(problems.items())[:_SHOWN]:
        others = f" and {len(places) - 1} more" if len(places) > 1 else ""
        lines.append(f"  {places[0]}{others}  {problem}")
    rest = sum(len(places) for places in list(problems.values())[_SHOWN:])
    return "\n".join([*lines, f"  and {rest} more"] if rest else lines)


def _prompt(source: SourcePlan, row: int, value: Any, shown: Mapping[str, str]) -> Prompt:
    if isinstance(value, RowError):
        raise value
    if not isinstance(value, dict):
        raise RowError(f"must be a JSON object, not {kind(value)}")
    prompt_field, key = source.main_field
    response_field = source.response_field
    if prompt_field not in value:
        raise RowError(missing_field(prompt_field, list(value), key))
    if source.text_field is not None and not isinstance(value[prompt_field], str):
        raise RowError(f"field {prompt_field!r} must be text, not {kind(value[prompt_field])}")
    if source.messages_field is not None:
        prompt, response = split_conversation(prompt_field, value[prompt_field])
        response_field = _AFTER_PROMPT
        value = {**value, prompt_field: prompt, _AFTER_PROMPT: response}
    tools = read_tools(source.tools_field, value.get(source.tools_field))
    names = tool_names(tools)
    messages = _messages(prompt_field, value[prompt_field], names)
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
        response=None if response_field is None else _response(response_field, value, names),
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
        fields: dict[str, str] = {}
        for i, each in enumerate(verifier.of):
            fields |= {each.reference_field: f"{key}.of.{i}.reference_field"} if each.reference_field else {}
            own = _reference_fields(each.verifier, each.reference_field or default, f"{key}.of.{i}.verifier")
            fields = own | fields
        return fields
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
        cause = f"field {field!r} is null" if field in row else missing_field(field, list(row), key)
        raise RowError(f"{user}: {cause}")
    return text


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
            f"field {field!r} ends with the assistant's message; a prompt ends before the response, and "
            "`messages_field` splits whole conversations"
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
