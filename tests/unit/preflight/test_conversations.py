"""What templates leave out of conversations, and how generation prompts differ."""

from __future__ import annotations

from typing import Any

import pytest

from mergeopd.data.chat_template import ChatTemplate
from mergeopd.data.renderer import Renderer
from mergeopd.data.teacher_prompt import TeacherPrompt
from mergeopd.preflight.conversations import template_notes
from mergeopd.types import Message, Prompt

PLAIN = """{%- for m in messages %}{{- '<' + m.role + '>' + (m.content or '') + '</s>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}"""
FULL = """{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- for m in messages %}{{- '<' + m.role + '>' }}
{%- if m.reasoning_content %}{{- '<think>' + m.reasoning_content + '</think>' }}{%- endif %}
{{- m.content or '' }}{%- for call in m.tool_calls or [] %}{{- call | tojson }}{%- endfor %}{{- '</s>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' }}{%- if thinks %}{{- '<think>' }}{%- endif %}{%- endif %}"""

CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"a": 1}}]}
PROMPT = Prompt(
    "s:0",
    "s",
    "d",
    (
        Message("user", "Hi"),
        Message("assistant", "", {**CALL, "reasoning_content": "hm"}),
        Message("tool", "1"),
    ),
    tools=({"type": "function", "function": {"name": "f"}},),
)
BARE = Prompt("s:1", "s", "d", (Message("user", "Hi"), Message("assistant", "Ho"), Message("user", "!")))


def renderer(source: str, name: str = "t.jinja", **arguments: Any) -> Renderer:
    template = ChatTemplate(source, {}, name=name, arguments=arguments)
    return Renderer(None, template, 1, (0,), 8, TeacherPrompt("Be brief."))  # type: ignore[arg-type]


def test_parts_that_a_template_leaves_out_are_named() -> None:
    notes = list(template_notes("s", [BARE, PROMPT], renderer(FULL), {"old": renderer(PLAIN, "old.jinja")}))
    remedy = "of source 's' out (old.jinja): give it a `template` that renders them"
    assert notes == [
        f"the chat template of teacher 'old' leaves {what} {remedy}"
        for what in ("the tools", "calls of tools", "the reasoning in earlier turns")
    ]


def test_prompts_without_such_parts_need_no_note() -> None:
    assert list(template_notes("s", [BARE], renderer(PLAIN), {"x": renderer(FULL)})) == []


def test_generation_prompts_that_differ_are_shown() -> None:
    (note,) = template_notes("s", [BARE], renderer(FULL), {"x": renderer(FULL, thinks=True)})
    assert note.startswith(
        'teacher \'x\' begins responses behind "<assistant><think>", the student behind "<assistant>": '
    )


@pytest.mark.parametrize("last", [None, "so"])
def test_reasoning_of_responses_that_is_left_out_is_named(last: str | None) -> None:
    fields = {"role": "assistant", "content": "Ho", "thinking": last}
    first = Message("assistant", "", {**CALL, "content": "", "reasoning_content": "hm"})
    response = (first, Message("tool", "1"), Message("assistant", "Ho", fields))
    prompts = [BARE, Prompt("s:2", "s", "d", (Message("user", "Hi"),), response=response)]
    assert list(template_notes("s", prompts, renderer(FULL), {})) == []
    calls = "{%- for call in m.tool_calls or [] %}{{- call | tojson }}{%- endfor %}{{- '</s>' }}"
    forgetful = PLAIN.replace("(m.content or '') + '</s>' }}", "(m.content or '') }}" + calls)
    last_only = FULL.replace("if m.reasoning_content", "if m.reasoning_content and m.tool_calls")
    for source in (forgetful, last_only) if last else (forgetful,):
        (note,) = template_notes("s", prompts, renderer(source), {})
        assert note.startswith(
            "the chat template of the student leaves the reasoning of responses of source 's'"
        )
