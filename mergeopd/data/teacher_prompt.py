"""Prompts of individual teachers, which can contain more than the student's, such as the reference (OPSD).

Only the conversation changes; the token ids of the response are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

import jinja2
from jinja2 import meta

from mergeopd.data.chat_template import not_a_template, sandbox
from mergeopd.errors import DataError
from mergeopd.types import Message, Prompt


class PromptTemplate:
    """A sandboxed Jinja template that replaces the last user message; unknown names are errors.

    Variables are `prompt` (the message text), `reference`, and other fields of the row. `fields` are the
    variables that it uses besides `prompt`. `name` is used in errors; `now` is the clock of `strftime_now`.
    Raises DataError if the source is not a template.
    """

    def __init__(self, source: str, *, name: str, now: Callable[[], datetime]) -> None:
        self.source = source
        self.name = name
        self._sandbox = sandbox(now, jinja2.StrictUndefined)
        with not_a_template(name):
            self._template = self._sandbox.compiled(source)
            names = meta.find_undeclared_variables(self._sandbox.parse(source))
        self.fields = frozenset(names) - set(self._sandbox.globals) - {"prompt"}

    def render(self, prompt: Prompt) -> str:
        """Render the message for one prompt. Raises DataError if it fails or there is no user message."""
        position = _last_user(prompt.messages)
        values = dict(prompt.fields)
        if prompt.reference is not None:
            values["reference"] = prompt.reference
        values["prompt"] = prompt.messages[position].content
        try:
            return self._sandbox.render(self._template, values)
        except Exception as error:
            kind = "" if type(error) is jinja2.TemplateError else f"{type(error).__name__}: "
            raise DataError(f"{self.name}: {kind}{str(error).removesuffix('.')}") from error


@dataclass(frozen=True, slots=True)
class TeacherPrompt:
    """Changes to a conversation for one teacher: system message and last user message."""

    system: str | None = None
    prompt: PromptTemplate | None = None

    def messages(self, prompt: Prompt) -> tuple[Message, ...]:
        """Return the teacher's conversation. Raises DataError if the template fails."""
        messages = list(prompt.messages)
        if self.prompt is not None:
            messages[_last_user(messages)] = Message("user", self.prompt.render(prompt))
        if self.system is not None:
            rest = messages[1:] if messages[0].role == "system" else messages
            messages = [Message("system", self.system), *rest]
        return tuple(messages)


SAME = TeacherPrompt()
"""The student's conversation, unchanged."""


def _last_user(messages: Sequence[Message]) -> int:
    for position in reversed(range(len(messages))):
        if messages[position].role == "user":
            return position
    raise DataError("the teacher's `prompt` replaces the last user message, and there is none")
