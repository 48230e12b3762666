"""Tool calls in the formats that models write, as text after a chat template's generation prompt."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeopd.tool_calls import ParsedTurn, ToolCall, parse_tool_calls

ADD, NOW = ToolCall("add", {"a": 1, "b": [2.5, None]}), ToolCall("now", {})
ADD_JSON = '{"name": "add", "arguments": {"a": 1, "b": [2.5, null]}}'
NOW_JSON = '{"name": "now", "arguments": {}}'
READABLE = {
    "hermes": (f"Let me see.\n<tool_call>\n{ADD_JSON}\n</tool_call>", "Let me see.", [ADD]),
    "two in tags": (
        f"<tool_call>{ADD_JSON}</tool_call>\n<tool_call>{NOW_JSON}</tool_call>",
        "",
        [ADD, NOW],
    ),
    "tag at the end of the response": (f"<tool_call>\n{NOW_JSON}\n", "", [NOW]),
    "qwen coder": (
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n[2.5, null]\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call><function=say>\n<parameter=text>\nHi\nyou</parameter></function></tool_call>",
        "",
        [ADD, ToolCall("say", {"text": "Hi\nyou"})],
    ),
    "llama": ('{"name": "add", "parameters": {"a": 1, "b": [2.5, null]}}', "", [ADD]),
    "two of llama": (f"<|python_tag|>{ADD_JSON}; {NOW_JSON}", "", [ADD, NOW]),
    "mistral": (f"I will.[TOOL_CALLS] [{ADD_JSON}, {NOW_JSON}]", "I will.", [ADD, NOW]),
    "mistral with id": (
        '[TOOL_CALLS][{"name": "now", "arguments": {}, "id": "A1b2C3d4E"}]',
        "",
        [ToolCall("now", {}, "A1b2C3d4E")],
    ),
    "mistral since v11": (
        '[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]add[CALL_ID]x1[ARGS]{"a": 1}',
        "",
        [NOW, ToolCall("add", {"a": 1}, "x1")],
    ),
    "list": (f"[{ADD_JSON}, {NOW_JSON}]\n", "", [ADD, NOW]),
    "openai": (
        '{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{\\"x\\": true}"}}',
        "",
        [ToolCall("f", {"x": True}, "call_1")],
    ),
    "after reasoning": (
        f"<think>maybe <tool_call>{ADD_JSON}</tool_call></think>\n<tool_call>{NOW_JSON}</tool_call>",
        f"<think>maybe <tool_call>{ADD_JSON}</tool_call></think>",
        [NOW],
    ),
}
CONTENT = [
    "",
    "The sum is 3.",
    '{"city": "Rome"}',
    "[]",
    '[{"name": "Ada"}, {"name": "Alan"}]',
    f"Call it like this: {ADD_JSON}",
    f"<think>I could use <tool_call>{ADD_JSON}</tool_call>",
]
BROKEN = {
    '<tool_call>{"name": "add", "arguments": {"a": 1}</tool_call>': "tool call 1 is not JSON: Expecting",
    '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>': "NaN is not a JSON number",
    '<tool_call>{"name": "f", "arguments": {"a": 1, "a": 2}}</tool_call>': "a key occurs twice",
    "<tool_call>[1]</tool_call>": "is not a JSON object",
    '<tool_call>{"arguments": {}}</tool_call>': "tool call 1 has no name",
    '<tool_call>{"name": "f"}</tool_call>': "of 'f' has no arguments",
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>': "of 'f' has arguments that are not a JSON object",
    '{"name": "f", "arguments": "{"}': "arguments that are not JSON",
    '{"name": "f", "parameters": {"a": ': "tool call 1 is not JSON",
    "<tool_call><function=f>1</function></tool_call>": "tool call 1 of 'f' has text between its parameters",
    "[TOOL_CALLS]nothing": "tool call 1 is not JSON",
    '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 100_000: "not JSON",
}


@pytest.mark.parametrize("name", READABLE)
def test_calls_are_read(name: str) -> None:
    text, content, calls = READABLE[name]
    assert parse_tool_calls(text) == ParsedTurn(content, tuple(calls))


@pytest.mark.parametrize("text", CONTENT)
def test_other_text_is_content(text: str) -> None:
    assert parse_tool_calls(text) == ParsedTurn(text, ())


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_malformed_calls_are_reported(text: str) -> None:
    turn = parse_tool_calls(text)
    assert turn.calls == ()
    assert len(turn.problems) == 1
    assert BROKEN[text] in turn.problems[0]


def test_one_malformed_call_leaves_the_others() -> None:
    turn = parse_tool_calls(f"<tool_call>{{</tool_call><tool_call>{NOW_JSON}</tool_call>")
    assert turn.calls == (NOW,)
    assert turn.problems[0].startswith("tool call 1 is not JSON")


PIECES = (
    *(
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "<|python_tag|>",
    ),
    *(
        "<function=f>",
        "</function>",
        "<parameter=a>",
        "</parameter>",
        "add",
        "text ",
        "1e999",
        '"a"',
        ":",
        ",",
        ";",
    ),
    *(
        ADD_JSON,
        NOW_JSON,
        "{",
        "}",
        "[",
        "]",
        '{"name": ',
        '"arguments": ',
        '{"function": []}',
        "\n",
        "\ud800",
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_no_text_raises(text: str) -> None:
    turn = parse_tool_calls(text)
    assert all(isinstance(call.name, str) and isinstance(call.arguments, dict) for call in turn.calls)
    if not turn.calls and not turn.problems:
        assert turn.content == text
