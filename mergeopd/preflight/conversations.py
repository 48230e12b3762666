"""Compare how the templates of student and teachers render the conversations of a source."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from mergeopd.data.renderer import Renderer
from mergeopd.data.trajectory import dataset_text
from mergeopd.errors import DataError
from mergeopd.types import REASONING_KEYS, Prompt


def template_notes(
    source: str, prompts: Sequence[Prompt], student: Renderer, teachers: Mapping[str, Renderer]
) -> Iterator[str]:
    """Yield what templates leave out of a source's prompts, and how they open responses differently.

    `teachers` score the student's tokens, so that their generation prompts matter; they are by name.
    """
    models = {"the student": student} | {f"teacher '{name}'": own for name, own in teachers.items()}
    yield from left_out(source, prompts, models)
    if _leaves_out_response_reasoning(prompts, student):
        yield (
            f"the chat template of the student leaves the reasoning of responses of source '{source}' out "
            f"({student.template.name}): it learns the text alone; a `template` can render both"
        )
    opening = _opening(prompts, student)
    for name, renderer in teachers.items():
        own = _opening(prompts, renderer)
        if opening is not None and own is not None and own != opening:
            yield (
                f"teacher '{name}' begins responses behind {_quoted(own)}, the student behind "
                f"{_quoted(opening)}: the teacher scores text that does not begin as its own does; "
                "`template_arguments` or `template` can make both equal"
            )


def left_out(source: str, prompts: Sequence[Prompt], models: Mapping[str, Renderer]) -> Iterator[str]:
    """Yield what the templates of models, by their name in messages, leave out of a source's prompts."""
    for what, without in _PARTS.items():
        for model, renderer in models.items():
            if _leaves_out(prompts, renderer, without):
                yield (
                    f"the chat template of {model} leaves {what} of source '{source}' out "
                    f"({renderer.template.name}): give it a `template` that renders them"
                )


def _without_tools(prompt: Prompt) -> Prompt:
    return replace(prompt, tools=())


def _without(*keys: str) -> Callable[[Prompt], Prompt]:
    return lambda prompt: replace(
        prompt, messages=tuple(message.without(*keys) for message in prompt.messages)
    )


_PARTS: Mapping[str, Callable[[Prompt], Prompt]] = {
    "the tools": _without_tools,
    "calls of tools": _without("tool_calls"),
    "the reasoning in earlier turns": _without(*REASONING_KEYS),
}


def _leaves_out(prompts: Sequence[Prompt], renderer: Renderer, without: Callable[[Prompt], Prompt]) -> bool:
    """Whether the first prompt with this part is rendered as if it had none."""
    prompt = next((one for one in prompts if without(one) != one), None)
    if prompt is None:
        return False
    try:
        return renderer.text(prompt) == renderer.text(without(prompt))
    except DataError:
        return False


def _leaves_out_response_reasoning(prompts: Sequence[Prompt], student: Renderer) -> bool:
    """Whether the first trajectory with reasoning is rendered as if its first or last such turn had none."""
    for prompt in prompts:
        turns = prompt.response if isinstance(prompt.response, tuple) else ()
        places = [i for i, turn in enumerate(turns) if turn.reasoning]
        if places:
            break
    else:
        return False
    without = (
        (*turns[:i], turns[i].without(*REASONING_KEYS), *turns[i + 1 :]) for i in (places[0], places[-1])
    )
    try:
        text = dataset_text(prompt, student)
        return any(dataset_text(replace(prompt, response=one), student) == text for one in without)
    except DataError:
        return False


def _opening(prompts: Sequence[Prompt], renderer: Renderer) -> str | None:
    """Return the generation prompt behind the first prompt; None where the template has none."""
    if not prompts:
        return None
    try:
        messages, tools = renderer.teacher_prompt.messages(prompts[0]), prompts[0].tools
        whole = renderer.template.render(messages, tools=tools)
        before = renderer.template.render(messages, tools=tools, add_generation_prompt=False)
    except DataError:
        return None
    return whole.removeprefix(before) if whole.startswith(before) else None


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
