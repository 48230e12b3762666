"""A teacher's own prompt: what it is shown beyond the student, such as the reference (OPSD, 2601.18734).

Only the conversation changes; the answer's token ids are the student's in either case.
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
    """A Jinja template of the last user message, in the sandbox of chat templates; unknown names are errors.

    It sees `prompt`, the message's text, `reference`, and the row's `fields` by name. `fields` are those that
    it may read beside `prompt`, in whatever branch. `name` is for errors; `now` is the clock of
    `strftime_now`. Raises DataError when the source is not a template.
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
        """The message for one prompt. Raises DataError when the template fails or no user speaks."""
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
    """How a conversation is changed for one teacher: its own system message, its own last user message."""

    system: str | None = None
    prompt: PromptTemplate | None = None

    def messages(self, prompt: Prompt) -> tuple[Message, ...]:
        """The conversation as the teacher sees it. Raises DataError where the prompt's template fails."""
        messages = list(prompt.messages)
        if self.prompt is not None:
            messages[_last_user(messages)] = Message("user", self.prompt.render(prompt))
        if self.system is not None:
            rest = messages[1:] if messages[0].role == "system" else messages
            messages = [Message("system", self.system), *rest]
        return tuple(messages)


SAME = TeacherPrompt()
"""A teacher that sees what the student sees."""


def _last_user(messages: Sequence[Message]) -> int:
    for position in reversed(range(len(messages))):
        if messages[position].role == "user":
            return position
    raise DataError("there is no user message that the teacher's own prompt could replace")
