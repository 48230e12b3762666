"""Prompts and system messages of individual teachers."""

from __future__ import annotations

from datetime import datetime

import pytest

from mergeopd.data.teacher_prompt import SAME, PromptTemplate, TeacherPrompt
from mergeopd.errors import DataError
from mergeopd.types import Message, Prompt

CHAT = (Message("system", "s"), Message("user", "first"), Message("assistant", "a"), Message("user", "last"))


def template(source: str) -> PromptTemplate:
    return PromptTemplate(source, name="teachers.t.prompt", now=lambda: datetime(2026, 1, 1))


def prompt(*messages: Message, **fields: str) -> Prompt:
    reference = fields.pop("reference", None)
    return Prompt("s:0", "s", "d", messages or (Message("user", "2 + 2?"),), {}, reference, None, fields)


def test_it_shows_the_message_the_reference_and_fields_of_the_row() -> None:
    own = template("{{ prompt }}\n\nA right answer: {{ reference }}{% if hint %} ({{ hint }}){% endif %}\n")
    assert own.fields == {"reference", "hint"}
    text = own.render(prompt(reference="4", hint="{{ prompt }}", other="x"))
    assert text == "2 + 2?\n\nA right answer: 4 ({{ prompt }})"  # what a row says is never a template


def test_names_that_a_template_makes_itself_are_no_fields() -> None:
    own = template(
        "{% set a = 1 %}{% for b in range(2) %}{{ a + b }}{% endfor %}{{ dict(c=1).c }}{{ strftime_now('%Y') }}"
    )
    assert own.fields == frozenset()
    assert own.render(prompt()) == "1212026"


def test_only_the_last_user_message_is_replaced() -> None:
    script = TeacherPrompt(None, template("[{{ prompt }}]"))
    assert script.messages(prompt(*CHAT)) == (*CHAT[:-1], Message("user", "[last]"))
    tool = Message("tool", "t")
    assert script.messages(prompt(*CHAT, tool))[3:] == (Message("user", "[last]"), tool)


def test_a_system_message_is_put_before_or_in_place_of_the_prompts_own() -> None:
    assert TeacherPrompt("x").messages(prompt(*CHAT)) == (Message("system", "x"), *CHAT[1:])
    assert TeacherPrompt("x").messages(prompt(*CHAT[1:])) == (Message("system", "x"), *CHAT[1:])
    assert SAME.messages(prompt(*CHAT)) == CHAT


@pytest.mark.parametrize(
    "source",
    [
        "{{ prompt.__class__ }}",
        "{{ prompt['__class__'] }}",
        "{{ prompt | attr('__class__') }}",
        "{{ '{0.__class__.__mro__}'.format(prompt) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ namespace(__class__=1) }}",
        "{{ range(10 ** 9) | list }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_there_is_no_way_out_of_the_sandbox(source: str) -> None:
    with pytest.raises(DataError, match=r"^teachers\.t\.prompt: "):
        template(source).render(prompt())


def test_rendering_errors_are_reported() -> None:
    with pytest.raises(DataError, match=r"^teachers\.t\.prompt: UndefinedError: 'hint' is undefined$"):
        template("{{ hint }}").render(prompt())
    with pytest.raises(DataError, match="no attribute 'solution'"):
        template("{{ hint.solution }}").render(prompt(hint="x"))
    with pytest.raises(DataError, match="replaces the last user message"):
        TeacherPrompt(None, template("x")).messages(prompt(Message("system", "s")))
    with pytest.raises(DataError, match=r"^teachers\.t\.prompt:2: not a Jinja template: "):
        template("\n{{ prompt")
    with pytest.raises(DataError, match="nested too deeply"):
        template("{{ " + "(" * 3000)
