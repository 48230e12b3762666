"""Parse the tool calls in the text of an assistant's message.

Formats: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes, Qwen), the same tags around
`<function=NAME><parameter=KEY>VALUE</parameter></function>` (Qwen3-Coder; a value that is no JSON is text),
`{"name": ..., "parameters": {...}}`, also after `<|python_tag|>` and several separated by `;` (Llama 3),
`[TOOL_CALLS][...]` and `[TOOL_CALLS]name[ARGS]{...}` (Mistral), and a message that is one JSON object or list
of calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mergeopd.strict_json import decoder, parse_json

_TAGGED = re.compile(r"<tool_call>(?P<body>.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"\s*<function=(?P<name>[^>\s]+)>(?P<body>.*?)(?:</function>\s*|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=(?P<key>[^>\s]+)>\n?(?P<value>.*?)\n?</parameter>", re.DOTALL)
_MISTRAL, _LLAMA = "[TOOL_CALLS]", "<|python_tag|>"
_NAMED = re.compile(r"\s*(?P<name>[\w.-]+)(?:\[CALL_ID\](?P<id>\w+))?\[ARGS\]")
_SEPARATOR = re.compile(r"[\s;,]*")
# A message that begins like this is meant as a call, also if it is not JSON.
_MEANT = re.compile(r'\[?\s*\{\s*"(?:name|function)"\s*:')
_KEYS = ("arguments", "parameters")
_DECODER = decoder()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool. `arguments` are JSON values; `id` is the identifier in the text, if any."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class ParsedTurn:
    """A message's text without its calls, its calls in order, and why others could not be read."""

    content: str
    calls: tuple[ToolCall, ...]
    problems: tuple[str, ...] = ()


class _CallError(ValueError):
    pass


def parse_tool_calls(text: str) -> ParsedTurn:
    """Split an assistant's message into content and tool calls. Never raises for a malformed call.

    Calls inside `<think>...</think>` are part of the content. A plain JSON value counts as calls only if it
    is the whole message and every object has a name with `arguments` or `parameters`.
    """
    thought, message = _split_thought(text)
    for form in (_tagged, _mistral, _whole):
        if (turn := form(message)) is not None:
            return replace(turn, content=thought + turn.content)
    return ParsedTurn(text, ())


def _split_thought(text: str) -> tuple[str, str]:
    start, end = text.rfind("<think>"), text.rfind("</think>")
    if start > end:
        return text, ""  # cut off while reasoning
    cut = 0 if end < 0 else end + len("</think>")
    return text[:cut], text[cut:]


def _tagged(message: str) -> ParsedTurn | None:
    bodies = [match["body"] for match in _TAGGED.finditer(message)]
    if not bodies:
        return None
    return _turn(_TAGGED.sub("", message).strip(), bodies, lambda body: [_tagged_call(body)])


def _tagged_call(body: str) -> ToolCall:
    function = _FUNCTION.fullmatch(body)
    if function is None:
        return _call(_parsed(body))
    if _PARAMETER.sub("", function["body"]).strip():
        raise _CallError(f"of {function['name']!r} has text between its parameters")
    pairs = [(match["key"], match["value"]) for match in _PARAMETER.finditer(function["body"])]
    if len({key for key, _ in pairs}) != len(pairs):
        raise _CallError(f"of {function['name']!r} has a parameter twice")
    return ToolCall(function["name"], {key: _json_or_text(value) for key, value in pairs})


def _json_or_text(value: str) -> Any:
    try:
        return _DECODER.decode(value)
    except (ValueError, RecursionError):
        return value


def _mistral(message: str) -> ParsedTurn | None:
    content, *bodies = message.split(_MISTRAL)
    return _turn(content.strip(), bodies, _mistral_calls) if bodies else None


def _mistral_calls(body: str) -> list[ToolCall]:
    named = _NAMED.match(body)
    if named is None:
        calls = [_call(value) for value in _values(body)]
        if not calls:
            raise _CallError("is empty")
        return calls
    return [_call({"name": named["name"], "arguments": _parsed(body[named.end() :]), "id": named["id"]})]


def _whole(message: str) -> ParsedTurn | None:
    body = message.strip()
    marked = body.startswith(_LLAMA)
    body = body.removeprefix(_LLAMA)
    try:
        values = list(_values(body))
    except _CallError as error:
        return ParsedTurn("", (), (f"tool call 1 {error}",)) if marked or _MEANT.match(body) else None
    if not values or not (marked or all(map(_looks_like_call, values))):
        return None
    return _turn("", values, lambda value: [_call(value)])


def _turn(content: str, parts: Iterable[Any], read: Callable[[Any], list[ToolCall]]) -> ParsedTurn:
    calls: list[ToolCall] = []
    problems: list[str] = []
    for part in parts:
        try:
            calls += read(part)
        except _CallError as error:
            problems.append(f"tool call {len(calls) + len(problems) + 1} {error}")
    return ParsedTurn(content, tuple(calls), tuple(problems))


def _looks_like_call(value: Any) -> bool:
    function = _function(value) if isinstance(value, dict) else {}
    return "name" in function and any(key in function for key in _KEYS)


def _values(text: str) -> Iterator[Any]:
    """Yield JSON values that `;`, a comma or white space separate; of lists, the entries."""
    at = _end(text, 0)
    while at < len(text):
        try:
            value, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _CallError(f"is not JSON: {error}") from None
        yield from value if isinstance(value, list) else [value]
        at = _end(text, at)


def _end(text: str, at: int) -> int:
    match = _SEPARATOR.match(text, at)
    return at if match is None else match.end()


def _parsed(text: str) -> Any:
    try:
        return _DECODER.decode(text.strip())
    except (ValueError, RecursionError) as error:
        raise _CallError(f"is not JSON: {error}") from None


def _function(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the object with name and arguments, which the format of OpenAI nests in `function`."""
    inner = value.get("function")
    return inner if isinstance(inner, dict) else value


def _call(value: Any) -> ToolCall:
    if not isinstance(value, dict):
        raise _CallError("is not a JSON object")
    function = _function(value)
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise _CallError("has no name")
    key = next((key for key in _KEYS if key in function), None)
    if key is None:
        raise _CallError(f"of {name!r} has no arguments")
    arguments = function[key]
    if isinstance(arguments, str):  # as in the API of OpenAI
        try:
            arguments = parse_json(arguments, float)
        except (ValueError, RecursionError) as error:
            raise _CallError(f"of {name!r} has arguments that are not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise _CallError(f"of {name!r} has arguments that are not a JSON object")
    call_id = value.get("id")
    return ToolCall(name, arguments, call_id if isinstance(call_id, str) else None)
