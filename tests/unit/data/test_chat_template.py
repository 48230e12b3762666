"""Rendering equals transformers' on templates like published ones."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from mergeopd.data.chat_template import ChatTemplate
from mergeopd.data.messages import read_message
from mergeopd.errors import DataError
from mergeopd.types import Message

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

THINKING = """
{%- if tools %}{{- '<tools>' + (tools | tojson) + '</tools>' }}{%- endif %}
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step=true, last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

HEADERS = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{% for message in messages %}
    {% if message.role == 'assistant' %}
        {% generation %}
{{ message.content | trim }}<|eot_id|>
        {% endgeneration %}
    {% else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {% endif %}
{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

INSTRUCTIONS = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""

ODDITIES = """{% for m in messages %}
  {% if loop.index > 3 %}{% break %}{% endif %}
  {% if not m.content %}{% continue %}{% endif %}
{{ {"text": m.content, "n": [1, 2]} | tojson }} {{ m | tojson(indent=2) }} {{ dict(a=1) | tojson }}
  {% set f = namespace(count=0, last=m.role) %}{% set f.count = f.count + 1 %}{{ f.count }}{{ f.last }}
{% endfor %}{{ tools is none }}{{ documents is none }}{{ unk_token is defined }}"""

CHATS = [
    [Message("user", "What is 2 + 2?\n")],
    [Message("system", "  Be <brief> & kind.  "), Message("user", 'héllo 漢字 🙂 "quoted"')],
    [
        Message("system", "Think."),
        Message("user", "One"),
        Message("assistant", "<think>\nhm\n</think>\n\nEins"),
        Message("user", "Two"),
    ],
    [
        Message("user", "Call"),
        Message("assistant", " <think>x</think>call() "),
        Message("user", "<b>\\n</b>"),
    ],
]
TOOL_CHAT = [
    Message("user", "go"),
    Message("assistant", "<think>a</think>b"),
    Message("tool", "1"),
    Message("tool", "2"),
]


@pytest.fixture(scope="module")
def reference() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("chat", CHATS, ids=["plain", "system", "turns", "brackets"])
@pytest.mark.parametrize(
    "source", [THINKING, HEADERS, INSTRUCTIONS, ODDITIES], ids=["think", "headers", "inst", "odd"]
)
def test_equals_transformers(reference: Any, source: str, chat: list[Message], generation: bool) -> None:
    expected = reference.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in chat],
        chat_template=source,
        add_generation_prompt=generation,
        tokenize=False,
    )
    found = ChatTemplate(source, SPECIAL).render(chat, add_generation_prompt=generation)
    assert found == expected
    assert found.strip()


def test_tool_messages_equal_transformers(reference: Any) -> None:
    chat = [{"role": m.role, "content": m.content} for m in TOOL_CHAT]
    expected = reference.apply_chat_template(
        chat, chat_template=THINKING, add_generation_prompt=True, tokenize=False
    )
    assert ChatTemplate(THINKING, SPECIAL).render(TOOL_CHAT) == expected


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": [1, None]}}}


@pytest.mark.parametrize(
    "row",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL], "content": "", "reasoning_content": "hm"},
        {"role": "assistant", "thinking": "hm", "content": "so"},
        {"reasoning": "hm", "role": "assistant", "content": "so"},
        {"role": "assistant", "content": "so", "reasoning": "b", "thinking": "a", "reasoning_content": None},
        {"role": "tool", "content": "1", "tool_call_id": "c", "name": "f", "extra": {"b": None}},
    ],
)
def test_templates_see_the_keys_that_transformers_passes(reference: Any, row: dict[str, Any]) -> None:
    source = "{% for m in messages %}{% for key, value in m.items() %}{{ key }}={{ value | tojson }};{% endfor %}{% endfor %}"
    user = {"role": "user", "content": "go"}
    expected = reference.apply_chat_template([user, row], chat_template=source, tokenize=False)
    messages = [read_message("m", one) for one in (user, row)]
    assert ChatTemplate(source, SPECIAL).render(messages, add_generation_prompt=False) == expected


def test_the_clock_is_an_argument() -> None:
    template = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", {}, now=lambda: datetime(2001, 2, 3))
    assert template.render(CHATS[0]) == "2001-02-03"


def test_a_refused_conversation_names_template_and_cause() -> None:
    template = ChatTemplate(INSTRUCTIONS, SPECIAL, name="teachers/x.jinja")
    with pytest.raises(DataError) as caught:
        template.render([Message("user", "a"), Message("user", "b")])
    assert str(caught.value) == (
        "teachers/x.jinja: cannot render a conversation (user, user): "
        "After the optional system message, roles must alternate user/assistant"
    )


def test_a_template_that_needs_content_says_so_of_null() -> None:
    call = read_message("m", {"role": "assistant", "content": None, "tool_calls": [CALL]})
    with pytest.raises(
        DataError, match=r"'content'; templates get no content where it is null: try an empty text$"
    ):
        ChatTemplate("{% for m in messages %}{{ m.content.strip() }}{% endfor %}", SPECIAL).render([call])


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("{{ messages[0].nothing.more }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% set ns = namespace(__class__=1) %}", "SecurityError"),
        ("{% set ns = namespace(a=1) %}{% set ns._b = 1 %}", "SecurityError"),
        ("{{ range(10000000) | list }}", "OverflowError"),
        ("{{ 'a' + 1 }}", "TypeError"),
    ],
)
def test_failing_and_hostile_templates(source: str, cause: str) -> None:
    with pytest.raises(DataError, match=f"^chat template: cannot render a conversation \\(user\\): {cause}"):
        ChatTemplate(source, {}).render(CHATS[0])


def test_a_template_that_does_not_parse_names_its_line() -> None:
    with pytest.raises(DataError, match=r"^card\.jinja:2: not a Jinja template: .*endfor"):
        ChatTemplate("a\n{% endfor %}", {}, name="card.jinja")
