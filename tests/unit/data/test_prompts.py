"""Prompt files: rows that are read, and errors for invalid ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergeopd.data.prompts import read_prompts
from mergeopd.errors import DataError
from mergeopd.recipe.plan import SourcePlan
from mergeopd.recipe.verifiers import needs_reference
from mergeopd.types import Message


def plan(path: Path, **fields: Any) -> SourcePlan:
    defaults: dict[str, Any] = {
        "name": "s",
        "source": str(path),
        "domain": "math",
        "verifier": None,
        "prompt_field": "prompt",
        "reference_field": "answer",
        "response_field": "response",
        "teachers": {"t": 0.5},
        "share": 1.0,
        "limit": None,
    }
    return SourcePlan.model_validate(defaults | fields)


def write(tmp_path: Path, *rows: Any, name: str = "p.jsonl") -> Path:
    path = tmp_path / name
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def message_of(source: SourcePlan) -> str:
    with pytest.raises(DataError) as caught:
        read_prompts(source)
    return str(caught.value)


def test_rows_become_prompts(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": ""}, {"role": "user", "content": "hé🙂"}]
    path = write(
        tmp_path,
        {"prompt": "one", "answer": 3, "response": "r"},
        "",
        {"prompt": chat, "answer": {"b": [1, None], "ä": True}},
    )
    first, second = read_prompts(plan(path))
    assert (first.key, first.messages, first.reference, first.response) == (
        "s:0",
        (Message("user", "one"),),
        "3",
        "r",
    )
    assert (first.source, first.domain, first.teachers) == ("s", "math", {"t": 0.5})
    assert (second.key, second.messages) == ("s:2", (Message("system", ""), Message("user", "hé🙂")))
    assert (second.reference, second.response) == ('{"b": [1, null], "ä": true}', None)
    assert read_prompts(plan(path, response_field=None))[0].response is None


@pytest.mark.parametrize(
    ("value", "text"), [("x", "x"), (1.5, "1.5"), (True, "true"), ([1], "[1]"), (None, None)]
)
def test_references_become_text(tmp_path: Path, value: Any, text: str | None) -> None:
    assert read_prompts(plan(write(tmp_path, {"prompt": "p", "answer": value})))[0].reference == text


def test_limit_stops_reading(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "a"}, {"prompt": "b"}, "{broken")
    assert [p.key for p in read_prompts(plan(path, limit=2))] == ["s:0", "s:1"]


def test_byte_order_mark_and_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False).encode() + b"\r\n"
    )
    assert read_prompts(plan(path))[0].messages[0].content == "a\u2028b"


def test_all_bad_rows_are_counted_and_the_first_ones_named(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"prompt": "fine"},
        "{oops",
        {"promt": "a"},
        [1],
        {"prompt": 5},
        {"prompt": " \n"},
        {"x": 1},
        {},
    )
    assert message_of(plan(path)) == (
        f"{path}: 7 of 8 rows cannot be used\n"
        f"  {path}:2  not JSON: Expecting property name enclosed in double quotes (column 2); "
        "write one JSON object per line\n"
        f"  {path}:3  field 'prompt' is missing; did you mean 'promt'?\n"
        f"  {path}:4  must be a JSON object, not a list\n"
        f"  {path}:5  field 'prompt' must be text or a list of messages, not a number\n"
        f"  {path}:6  field 'prompt' is an empty prompt\n"
        "  and 2 more"
    )


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "is an empty prompt"),
        ([{"role": "user", "content": " "}], "is an empty prompt"),
        (["hi"], "prompt[0] must be an object with role and content, not text"),
        ([{"role": "user"}], "prompt[0].content must be text or a list of text parts, not null"),
        ([{"role": "user", "content": ["parts"]}], "prompt[0].content[0] is no text part (text); only text"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "u"}]}],
            "prompt[0].content[0] is no text part (image); only text is supported",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "content[0].text must be text, not null"),
        ([{"role": "usr", "content": "a"}], "prompt[0].role is 'usr'; did you mean 'user'?"),
        ([{"role": "human", "content": "a"}], "must be one of system, user, assistant, tool"),
        ([{"role": "user", "content": "a", "name": 1}], "prompt[0].name must be text, not a number"),
        ([{"role": "user", "content": "a", "tool_calls": []}], "only the assistant calls tools"),
        ([{"role": "user", "content": "a", "reasoning_conten": "b"}], "did you mean 'reasoning_content'?"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "ends with the assistant's message",
        ),
        ("half \ud800", "an unpaired surrogate at character 6"),
    ],
)
def test_bad_prompts(tmp_path: Path, prompt: Any, message: str) -> None:
    assert message in message_of(plan(write(tmp_path, {"prompt": prompt})))


CALL = {"role": "assistant", "content": "f()"}
RESULT = {"role": "tool", "content": ""}


def test_dataset_responses(tmp_path: Path) -> None:
    """Messages are a trajectory; other lists and objects are JSON, which an answer may well be."""
    turns = [CALL, RESULT, {"role": "user", "content": "a\r\nb"}, CALL]
    answers = [
        "text",
        turns,
        [CALL],
        [{"name": "f"}],
        {"role": "assistant", "content": "a"},
        [1, [CALL]],
        None,
    ]
    path = write(tmp_path, *({"prompt": "p", "response": answer} for answer in answers))
    call = Message("assistant", "f()")
    assert [prompt.response for prompt in read_prompts(plan(path))] == [
        "text",
        (call, Message("tool", ""), Message("user", "a\r\nb"), call),
        (call,),
        '[{"name": "f"}]',
        '{"role": "assistant", "content": "a"}',
        '[1, [{"role": "assistant", "content": "f()"}]]',
        None,
    ]


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ([], "field 'response' is an empty list; a trajectory has at least one assistant's message"),
        ([RESULT, CALL], "response[0].role is 'tool'; a trajectory begins with the assistant's message"),
        ([CALL, RESULT], "response[1].role is 'tool'; a trajectory ends with the assistant's message"),
        (
            [CALL, {"role": "system", "content": "s"}, CALL],
            "response[1].role is 'system'; instructions belong",
        ),
        ([CALL, "text"], "response[1] must be an object with role and content, not text"),
        ([{"content": "f()"}], "response[0].role must be text, not null"),
        ([{**CALL, "content": None}], "response[0].content must be text or a list of text parts, not null"),
        (
            [{**CALL, "tool_calls": [{"name": "f", "arguments": "{x"}]}, CALL],
            "response[0].tool_calls[0].arguments is not JSON: Expecting property name",
        ),
        (
            [{**CALL, "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}, CALL],
            "response[0].tool_calls[0].function.arguments must be a JSON object, not a list",
        ),
        (
            [{**CALL, "tool_calls": [{"id": "1", "arguments": {}}]}, CALL],
            "response[0].tool_calls[0] has no name of a function",
        ),
        ([{**CALL, "content": "\ud800"}], "field 'response[0].content' has an unpaired surrogate"),
    ],
)
def test_bad_trajectories(tmp_path: Path, response: Any, message: str) -> None:
    assert message in message_of(plan(write(tmp_path, {"prompt": "p", "response": response})))


def test_trajectories_in_parquet_read_as_in_jsonl(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "p", "response": [CALL, RESULT, CALL]}, {"prompt": "q", "response": [CALL]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert read_prompts(plan(tmp_path / "p.parquet")) == read_prompts(plan(write(tmp_path, *rows)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": NaN}', "NaN is not a JSON number"),
        ("[" * 100_000, "not JSON"),
        ('{"prompt": ' + "9" * 10_000 + "}", "not JSON"),
    ],
)
def test_hostile_lines(tmp_path: Path, line: str, message: str) -> None:
    assert message in message_of(plan(write(tmp_path, line)))


def test_rows_with_the_same_problem_are_reported_together(tmp_path: Path) -> None:
    path = write(tmp_path, {"x": 1}, {"prompt": 5}, {"x": 2}, {"x": 3})
    assert message_of(plan(path)) == (
        f"{path}: 4 of 4 rows cannot be used\n"
        f"  {path}:1 and 2 more  field 'prompt' is missing (there is 'x'); name the field with `prompt_field`\n"
        f"  {path}:2  field 'prompt' must be text or a list of messages, not a number"
    )


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "caf\xe9"}\n')
    assert f"{path}:1  not UTF-8 (byte 16)" in message_of(plan(path))


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    assert message_of(plan(path)) == f"{path}: has no prompts; a source needs at least one row"


def test_unreadable_files(tmp_path: Path) -> None:
    assert "there is no such file" in message_of(plan(tmp_path / "no.jsonl"))
    (tmp_path / "dir.jsonl").mkdir()
    assert "contain any data files" in message_of(plan(tmp_path / "dir.jsonl"))
    (tmp_path / "p.txt").write_text("a")
    assert "not a .jsonl, .json, .csv or .parquet file" in message_of(plan(tmp_path / "p.txt"))
    (tmp_path / "p.parquet").write_text("no parquet")
    assert "not a readable parquet file" in message_of(plan(tmp_path / "p.parquet"))


def test_references_where_the_verifier_needs_them(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"prompt": "a", "answer": "1"},
        {"prompt": "b", "anwser": "1"},
        {"prompt": "c", "answer": None},
    )
    assert len(read_prompts(plan(path, verifier={"kind": "user", "function": "m:f"}))) == 3
    message = message_of(plan(path, verifier={"kind": "number"}))
    assert (
        f"{path}:2  verifier 'number' needs a reference: field 'answer' is missing; did you mean 'anwser'?"
        in message
    )
    assert f"{path}:3  verifier 'number' needs a reference: field 'answer' is null" in message


@pytest.mark.parametrize(
    ("verifier", "needed"),
    [
        (None, False),
        ({"kind": "exact"}, True),
        ({"kind": "number"}, True),
        ({"kind": "json"}, True),
        ({"kind": "json", "schema_file": "/s.json"}, False),
        ({"kind": "regex", "pattern": "a"}, False),
        ({"kind": "regex", "pattern": "(?P<answer>a)"}, True),
        ({"kind": "user", "function": "m:f"}, False),
    ],
)
def test_needs_reference(verifier: dict[str, str] | None, needed: bool) -> None:
    assert needs_reference(plan(Path("/p.jsonl"), verifier=verifier).verifier) is needed


def test_parquet_reads_as_jsonl_does(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i}", "name": None}],
            "answer": i,
            "response": None,
            "noise": b"\xff",
        }
        for i in range(10)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet", row_group_size=3)
    lines = write(tmp_path, *({k: v for k, v in row.items() if k != "noise"} for row in rows))
    assert read_prompts(plan(tmp_path / "p.parquet")) == read_prompts(plan(lines))
    assert len(read_prompts(plan(tmp_path / "p.parquet", limit=4))) == 4
    assert "did you mean 'prompt'?" in message_of(plan(tmp_path / "p.parquet", prompt_field="prompts"))
    needs = message_of(plan(tmp_path / "p.parquet", reference_field="answers", verifier={"kind": "number"}))
    assert needs == f"{tmp_path / 'p.parquet'}: field 'answers' is missing; did you mean 'answer'?"


def test_fields_that_teachers_are_shown_are_read_as_text(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"prompt": "p", "answer": 3, "steps": ["a", "b"], "note": f"n{i}", "noise": "x"} for i in range(3)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    lines = write(tmp_path, *rows)
    shown = {"steps": "t", "note": "t", "reference": "t"}
    prompts = read_prompts(plan(lines), shown)
    assert [dict(p.fields) for p in prompts] == [{"note": f"n{i}", "steps": '["a", "b"]'} for i in range(3)]
    assert read_prompts(plan(tmp_path / "p.parquet"), shown) == prompts
    assert read_prompts(plan(lines))[0].fields == {}
    with pytest.raises(DataError, match=r"p.parquet: field 'nots' is missing; did you mean 'note'\?$"):
        read_prompts(plan(tmp_path / "p.parquet"), {"nots": "t"})
    with pytest.raises(DataError, match=r"field 'solution' is missing .*`teachers\.t\.prompt`$"):
        read_prompts(plan(tmp_path / "p.parquet"), {"solution": "t"})
    with pytest.raises(DataError, match=r"p\.parquet: field 'answers' is missing; did you mean 'answer'"):
        read_prompts(plan(tmp_path / "p.parquet", reference_field="answers"), {"reference": "t"})


def test_parquet_rows_are_named(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", None]}), path)
    assert f"  {path}: row 1  field 'prompt' must be text or a list of messages, not null" in message_of(
        plan(path)
    )


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALLING = [
    {"role": "user", "content": [{"type": "text", "text": "Is it"}, {"type": "text", "text": "raining?"}]},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Look it up.",
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Bern", "days": null}'},
            }
        ],
    },
    {"role": "tool", "content": "no", "tool_call_id": "c1", "name": "weather"},
]


def test_calls_of_tools_are_read_as_templates_take_them(tmp_path: Path) -> None:
    row = {"prompt": CALLING, "tools": json.dumps([WEATHER])}
    (prompt,) = read_prompts(plan(write(tmp_path, row)))
    assert prompt.tools == (WEATHER,)
    user, call, tool = prompt.messages
    assert user.content == "Is it\nraining?"
    assert user.fields == CALLING[0]
    (expected,) = CALLING[1]["tool_calls"]
    function = {"name": "weather", "arguments": {"city": "Bern", "days": None}}
    assert call.tool_calls == [{**expected, "function": function}]
    assert (call.content, call.fields["content"], call.fields["reasoning_content"]) == (
        "",
        None,
        "Look it up.",
    )
    assert dict(tool.fields) == CALLING[2]
    assert hash(prompt.messages) == hash(prompt.messages)


def test_a_call_of_an_undeclared_tool_is_refused(tmp_path: Path) -> None:
    declared = {"function": {**WEATHER["function"], "name": "wether"}}
    row = {"prompt": CALLING, "tools": [declared]}
    assert message_of(plan(write(tmp_path, row))).endswith(
        "prompt[1].tool_calls[0].function calls 'weather', which is not among the row's tools; "
        "did you mean 'wether'?"
    )


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("[{", "field 'tools' is not JSON"),
        ({"name": "f"}, "field 'tools' must be a list of JSON schemas, not an object"),
        ([{"type": "function"}], "tools[0] has no name of a function"),
    ],
)
def test_bad_tools(tmp_path: Path, tools: Any, message: str) -> None:
    assert message in message_of(plan(write(tmp_path, {"prompt": "a", "tools": tools})))


def test_nulls_with_which_parquet_fills_objects_are_removed(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": 2}}]
    prompt = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    prompt.append({"role": "tool", "content": "1"})
    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": prompt}]), path)
    (read,) = read_prompts(plan(path))
    assert read.messages[1].tool_calls == calls
    assert read.messages[0].fields == {}
