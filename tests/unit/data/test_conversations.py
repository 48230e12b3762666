"""Whole conversations are split into a prompt and a response."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergeopd.data.prompts import read_prompts
from mergeopd.errors import DataError, RecipeError
from mergeopd.preflight.inputs import preflight
from mergeopd.recipe.plan import SourcePlan
from mergeopd.types import Message, Prompt


def prompt_of(tmp_path: Path, conversation: Any, **fields: Any) -> Prompt:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"messages": conversation, "response": "of another column"}) + "\n")
    given: dict[str, Any] = {"name": "s", "source": str(path), "domain": "chat", "verifier": None}
    given |= {"prompt_field": "prompt", "reference_field": "answer", "response_field": "response"}
    given |= {"messages_field": "messages", "teachers": {}, "share": 1.0, "limit": None}
    return read_prompts(SourcePlan.model_validate(given | fields))[0]


def say(*turns: str) -> list[dict[str, str]]:
    """Messages `role:content`."""
    return [dict(zip(("role", "content"), turn.split(":"), strict=True)) for turn in turns]


SYSTEM, Q, R, TOOL = "system:s", "user:q", "assistant:r", "tool:t"


@pytest.mark.parametrize(
    ("conversation", "num_prompt", "response"),
    [
        ([SYSTEM, Q, R], 2, "r"),
        ([Q, R, "user:q2", "assistant:r2"], 3, "r2"),
        ([Q], 1, None),
        ([Q, R, TOOL, "assistant:r2"], 1, [R, TOOL, "assistant:r2"]),
    ],
)
def test_the_users_last_message_ends_the_prompt(
    tmp_path: Path, conversation: list[str], num_prompt: int, response: Any
) -> None:
    prompt = prompt_of(tmp_path, say(*conversation))
    assert [f"{m.role}:{m.content}" for m in prompt.messages] == conversation[:num_prompt]
    turns = prompt.response
    assert (turns if not isinstance(turns, tuple) else [f"{m.role}:{m.content}" for m in turns]) == response


@pytest.mark.parametrize(
    "more",
    [{"content": [{"type": "text", "text": "r"}]}, {"reasoning_content": "why"}],
)
def test_more_than_a_text_stays_a_message(tmp_path: Path, more: dict[str, Any]) -> None:
    prompt = prompt_of(tmp_path, [*say(Q), {"role": "assistant", "content": "r", **more}])
    assert isinstance(prompt.response, tuple)
    assert [(turn.role, turn.content) for turn in prompt.response] == [("assistant", "r")]


def test_sharegpt_is_the_same_conversation(tmp_path: Path) -> None:
    pairs = [("system", "s"), ("human", "q"), ("gpt", "r"), ("observation", "t"), ("gpt", "r2")]
    prompt = prompt_of(tmp_path, [{"from": speaker, "value": text} for speaker, text in pairs])
    assert prompt.messages == (Message("system", "s"), Message("user", "q"))
    assert prompt.response == (Message("assistant", "r"), Message("tool", "t"), Message("assistant", "r2"))


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        (say(SYSTEM, R), "has no message of the user"),
        ("text", "must be a list of messages"),
        ([{"from": "function_call", "value": "{}"}], "messages[0].from is 'function_call'; must be one of"),
        (say(Q, R, TOOL), "a trajectory ends with the assistant's message"),
        (say(Q, "asistant:r"), "did you mean 'assistant'?"),
    ],
)
def test_other_conversations_are_told(tmp_path: Path, conversation: Any, message: str) -> None:
    with pytest.raises(DataError, match="1 of 1 row cannot be used") as caught:
        prompt_of(tmp_path, conversation)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "`messages_field: messages` splits whole conversations"),
        ({"prompt": say(Q, R)}, "a prompt ends before the response, and `messages_field` splits"),
    ],
)
def test_the_key_is_named_where_it_helps(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DataError) as caught:
        prompt_of(tmp_path, say(Q), source=str(path), messages_field=None)
    assert message in str(caught.value)


def test_recipes_train_on_conversations(
    write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_job()
    chats = [say("user:a", "assistant:b"), say("user:b", "assistant:c"), say("user:c")]
    Path("chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    changes = ["prompts.0.source=chat.jsonl", "prompts.0.messages_field=messages"]
    source = preflight(recipe, changes).plan.sources[0]
    assert [p.response for p in read_prompts(source)] == ["b", "c", None]
    with pytest.raises(
        RecipeError, match=r"1 of 3 conversations ends with the user's message: chat\.jsonl:3"
    ):
        preflight(recipe, [*changes, "phases.0.text=dataset"])
    with pytest.raises(RecipeError, match="`messages_field` takes the place of `response_field`"):
        preflight(recipe, [*changes, "prompts.0.response_field=completion"])
