"""Other ways in which a teacher could read the prompts, to find out whether its template is the right one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from mergeopd.data.chat_template import ChatTemplate
from mergeopd.data.renderer import Renderer
from mergeopd.errors import DataError, TokenizerError
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.recipe.plan import TeacherPlan
from mergeopd.types import Prompt

# Variables with which templates of many families turn reasoning on and off; unset, they reason.
_THINKING = ("enable_thinking", "thinking")


def other_renderings(
    teacher: TeacherPlan, own: Renderer, student: Renderer, prompts: Sequence[Prompt], now: datetime
) -> dict[str, Renderer]:
    """Return the other renderers of a teacher with the student's tokenizer, by what differs.

    These are the student's template, the one in the teacher's folder if its card has another, and its own
    with reasoning turned on or off. One that renders these prompts as an earlier one does is left out.
    """
    known = [_texts(own, prompts)]
    others = {}
    for name, template in _templates(teacher, own, student, now):
        renderer = replace(own, template=template)
        try:
            texts = _texts(renderer, prompts)
        except DataError:
            continue  # no rendering that the teacher could have been trained with
        if texts not in known:
            known.append(texts)
            others[name] = renderer
    return others


def _templates(
    teacher: TeacherPlan, own: Renderer, student: Renderer, now: datetime
) -> Iterator[tuple[str, ChatTemplate]]:
    yield "the student's template", student.template
    template = own.template
    if teacher.template is not None and teacher.tokenizer is not None:
        try:
            tokenizer = Tokenizer.load(Path(teacher.tokenizer))
            if tokenizer.chat_template is not None:
                yield (
                    "the template in its folder",
                    ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens, now=lambda: now),
                )
        except (TokenizerError, DataError):
            pass  # a folder without a usable template is why the card has one
    for variable in _THINKING:
        if variable in template.variables:
            value = not template.arguments.get(variable, True)
            arguments = {**template.arguments, variable: value}
            yield (
                f"`{variable}: {str(value).lower()}`",
                ChatTemplate(template.source, template.special_tokens, now=lambda: now, arguments=arguments),
            )


def _texts(renderer: Renderer, prompts: Sequence[Prompt]) -> list[str]:
    return [renderer.text(prompt) for prompt in prompts]
