"""The verifier of tool calls, against a reference and the tools' JSON schemas."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from mergeopd.errors import VerifierError
from mergeopd.recipe.verifiers import ToolCallVerifier
from mergeopd.reward.json_answers import schema_validator
from mergeopd.reward.protocol import Verify, reference_values, required, short
from mergeopd.strict_json import is_equal
from mergeopd.tool_calls import ToolCall, parse_tool_calls

_COMPOSED = {"allOf", "anyOf", "oneOf", "$ref", "patternProperties"}


def build_tool_call(spec: ToolCallVerifier, allow_code: Collection[str]) -> Verify:
    def verify(response: str, reference: str | None, /, *, truncated: bool = False) -> float:
        expected, tools = _expected(spec, required("tool_call", reference))
        turn = parse_tool_calls(response)
        if turn.problems or (tools is not None and any(_misuse(call, tools) for call in turn.calls)):
            return 0.0
        return float(bool(turn.calls) if expected is None else _are_equal(turn.calls, expected))

    return verify


def tool_call_problem(spec: ToolCallVerifier, reference: str) -> str | None:
    """Return why no response can make the calls of a reference."""
    try:
        _expected(spec, reference)
    except VerifierError as error:
        return str(error)
    return None


def _expected(
    spec: ToolCallVerifier, reference: str
) -> tuple[tuple[ToolCall, ...] | None, Mapping[str, Any] | None]:
    """Return the reference's calls and a validator for each tool's arguments. Raises VerifierError."""
    calls: Any = reference
    tools = None
    if spec.tools_field is not None:
        values = reference_values("tool_call", reference)
        tools = _tools(spec.tools_field, values["tools"])
        calls = values.get("calls")
    if not spec.compare:
        return None, tools
    text = calls if isinstance(calls, str) else json.dumps(calls)
    turn = parse_tool_calls(text)
    if turn.problems or (not turn.calls and text.strip() not in ("[]", "null", "")):
        reason = turn.problems[0] if turn.problems else "write objects with name and arguments"
        raise VerifierError(f"the reference {short(text)} is not a list of tool calls: {reason}")
    for call in turn.calls:
        if tools is not None and (problem := _misuse(call, tools)) is not None:
            raise VerifierError(f"the reference's {problem}")
    return turn.calls, tools


def _tools(field: str, value: Any) -> dict[str, Any]:
    """Return a validator of the arguments of each tool. Schemas may be in the format of OpenAI."""
    if isinstance(value, str):
        value = reference_values("tool_call", value)
    tools = {}
    for index, tool in enumerate(value if isinstance(value, list) else [None]):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise VerifierError(f"the field {field!r} is not a list of tools with name and parameters")
        schema = function.get("parameters") or {}
        if isinstance(schema, dict) and "properties" in schema and not _COMPOSED & schema.keys():
            schema = {"additionalProperties": False, **schema}  # an argument that the tool does not have
        tools[function["name"]] = schema_validator(schema, f"{field}[{index}].parameters")
    return tools


def _misuse(call: ToolCall, tools: Mapping[str, Any]) -> str | None:
    """Return why a call does not fit the tools."""
    import referencing.exceptions

    if call.name not in tools:
        return f"tool {call.name!r} is not declared; tools are {', '.join(map(repr, tools)) or 'none'}"
    try:
        error = next(tools[call.name].iter_errors(dict(call.arguments)), None)
    except referencing.exceptions.Unresolvable as unresolved:
        raise VerifierError(
            f"tool {call.name!r}: $ref {unresolved.ref!r} is not in its schema"
        ) from unresolved
    return None if error is None else f"call of {call.name!r}: {error.json_path}: {short(error.message)}"


def _are_equal(calls: tuple[ToolCall, ...], expected: tuple[ToolCall, ...]) -> bool:
    """Compare calls in any order; ids are not compared."""
    left = list(expected)
    for call in calls:
        same = next(
            (i for i, c in enumerate(left) if c.name == call.name and is_equal(c.arguments, call.arguments)),
            None,
        )
        if same is None:
            return False
        del left[same]
    return not left
