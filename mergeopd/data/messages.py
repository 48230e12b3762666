"""Read conversations of rows: messages, calls of tools, and the schemas of tools."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mergeopd.types import REASONING_KEYS, Message

_ROLES = ("system", "user", "assistant", "tool")
# Other keys are passed to the template as they are; a key close to one of these is a typing error.
_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", *REASONING_KEYS)


class RowError(Exception):
    """A problem of one row, without its location."""


def read_message(place: str, value: Any, tools: Collection[str] = ()) -> Message:
    """Read a message of role, content and other keys, as transformers' chat templates take it.

    Content is text, a list of text parts, or null where there are calls. Arguments of calls are objects; a
    text is parsed, as OpenAI's format has it. With `tools`, calls name one of them. Raises RowError.
    """
    if not isinstance(value, Mapping):
        raise RowError(f"{place} must be an object with role and content, not {kind(value)}")
    fields = {key: item for key, item in value.items() if item is not None or key == "content"}
    role = fields.get("role")
    if not isinstance(role, str):
        raise RowError(f"{place}.role must be text, not {kind(role)}")
    if role not in _ROLES:
        close = difflib.get_close_matches(role, _ROLES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"must be one of {', '.join(_ROLES)}"
        raise RowError(f"{place}.role is {role!r}; {hint}")
    for key in fields.keys() - set(_KEYS):
        close = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.8)
        if close:
            raise RowError(f"{place} has {key!r}; did you mean {close[0]!r}?")
    for key in ("tool_call_id", "name", *REASONING_KEYS):
        if not isinstance(fields.get(key, ""), str):
            raise RowError(f"{place}.{key} must be text, not {kind(fields[key])}")
    if "tool_calls" in fields:
        if role != "assistant":
            raise RowError(
                f"{place} has 'tool_calls', and its role is {role!r}; only the assistant calls tools"
            )
        fields["tool_calls"] = _calls(f"{place}.tool_calls", fields["tool_calls"], tools)
    content = _content(f"{place}.content", fields)
    is_plain = fields.keys() == {"role", "content"} and isinstance(fields["content"], str)
    return Message(role, content, {} if is_plain else fields)  # type: ignore[arg-type]


def _content(place: str, fields: Mapping[str, Any]) -> str:
    """Return the text of a message; parts are separated by line breaks."""
    content = fields.get("content")
    if isinstance(content, str):
        return checked(place, content)
    if content is None and fields.get("tool_calls"):
        return ""
    if not isinstance(content, list) or not content:
        raise RowError(f"{place} must be text or a list of text parts, not {kind(content)}")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            what = part.get("type", "no type") if isinstance(part, Mapping) else kind(part)
            raise RowError(f"{place}[{i}] is no text part ({what}); only text is supported")
        if not isinstance(part.get("text"), str):
            raise RowError(f"{place}[{i}].text must be text, not {kind(part.get('text'))}")
        texts.append(checked(f"{place}[{i}].text", part["text"]))
    return "\n".join(texts)


def _calls(place: str, value: Any, tools: Collection[str]) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise RowError(f"{place} must be a list of calls, not {kind(value)}")
    return [_call(f"{place}[{i}]", call, tools) for i, call in enumerate(value)]


def _call(place: str, value: Any, tools: Collection[str]) -> dict[str, Any]:
    """Return a call with its arguments as an object, in the form of the row: with `function` or without."""
    if not isinstance(value, Mapping):
        raise RowError(f"{place} must be an object with a function's name and arguments, not {kind(value)}")
    call = {key: item for key, item in value.items() if item is not None}
    function, where = call.get("function", call), f"{place}.function" if "function" in call else place
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(f"{where} has no name of a function; a call is `{{name, arguments}}`")
    name, arguments = function["name"], function.get("arguments")
    if tools and name not in tools:
        close = difflib.get_close_matches(name, tools, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the row has {', '.join(map(repr, tools))}"
        raise RowError(f"{where} calls {name!r}, which is not among the row's tools; {hint}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise RowError(f"{where}.arguments is not JSON: {error}") from error
    if not isinstance(arguments, Mapping | None):
        raise RowError(f"{where}.arguments must be a JSON object, not {kind(arguments)}")
    function = {**function, "arguments": dict(arguments or {})}
    return {**call, "function": function} if "function" in call else function


def read_tools(field: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    """Read a list of JSON schemas of functions, or its JSON text; null is none. Raises RowError."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "[]")
        except (ValueError, RecursionError) as error:
            raise RowError(f"field {field!r} is not JSON: {error}") from error
    if not isinstance(value, list | None):
        raise RowError(f"field {field!r} must be a list of JSON schemas, not {kind(value)}")
    for i, tool in enumerate(value or ()):
        if not isinstance(tool, Mapping) or not isinstance(_function(tool).get("name"), str):
            raise RowError(
                f"{field}[{i}] has no name of a function; a tool is "
                '`{"type": "function", "function": {"name", "description", "parameters"}}`'
            )
    return tuple(value or ())


def tool_names(tools: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the names of the functions that these schemas declare."""
    return tuple(str(_function(tool)["name"]) for tool in tools)


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function", tool)
    return function if isinstance(function, Mapping) else {}


def kind(value: Any) -> str:
    """Name the JSON type of a value, with an article."""
    names = {type(None): "null", bool: "a boolean", dict: "an object", list: "a list", str: "text"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def checked(field: str, text: str) -> str:
    """Return a text that a tokenizer accepts. Raises RowError."""
    # JSON can escape unpaired surrogates, which no tokenizer accepts.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"field {field!r} has an unpaired surrogate at character {error.start + 1}") from error
    return text
