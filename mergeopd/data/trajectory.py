"""Dataset responses: texts, and logged trajectories with turns of tools and users."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from mergeopd.data.chat_template import ChatTemplate
from mergeopd.data.renderer import Renderer
from mergeopd.errors import DataError
from mergeopd.types import Message, Prompt

_EXCERPT = 30
_ONE_EACH = (
    "make a row of each of the assistant's turns, with the turns before it in the prompt and its text as the "
    "response"
)


class Segment(NamedTuple):
    """A piece of a rendered trajectory; `is_own`: it is the assistant's."""

    text: str
    is_own: bool


class DatasetResponse(NamedTuple):
    """A response as token ids. `trained` flags those in the loss; None: all."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...] | None


def segments(prompt: Prompt, trajectory: Sequence[Message], template: ChatTemplate) -> tuple[Segment, ...]:
    """Render the trajectory after a prompt, split at the start and end of assistant turns.

    A turn starts after the generation prompt and ends where the rendering of the conversation up to it ends.
    The segments are contiguous.

    Raises DataError if the template rejects the conversation, omits a message, or renders a turn differently
    once another follows; the policy would otherwise train on texts that do not occur in use.
    """

    def rendered(num_turns: int, *, prompted: bool) -> str:
        try:
            return template.render(
                (*prompt.messages, *trajectory[:num_turns]),
                tools=prompt.tools,
                add_generation_prompt=prompted,
            )
        except DataError as error:
            raise DataError(f"{error}; change the conversation or the template") from error

    parts: list[Segment] = []
    last, shown, end = 0, rendered(0, prompted=True), rendered(0, prompted=False)
    for i, turn in enumerate(trajectory):
        before, end = end, rendered(i + 1, prompted=False)
        if not turn.is_empty and end == before:
            raise DataError(
                f"{template.name}: leaves out response[{i}], a message of role {turn.role!r}; "
                "choose a template that renders such messages"
            )
        if turn.role != "assistant":
            continue
        start = rendered(i, prompted=True)
        if i:
            between = _rest(shown, start)
            if between is None:
                raise DataError(
                    f"{template.name}: response[{last}] is rendered differently once response[{last + 1}] "
                    f"follows: {_change(shown, start)}; {_ONE_EACH}, or give the student a template that "
                    "does not change earlier turns"
                )
            parts.append(Segment(between, is_own=False))
        own = _rest(start, end)
        if own is None:
            raise DataError(
                f"{template.name}: response[{i}] does not begin with the generation prompt: "
                f"{_change(start, end)}; {_ONE_EACH}, or correct the template"
            )
        parts.append(Segment(own, is_own=True))
        last, shown = i, end
    return tuple(parts)


def dataset_response(prompt: Prompt, student: Renderer) -> DatasetResponse:
    """Encode the prompt's dataset response.

    A text is followed by the student's end token. A trajectory is rendered by the student's template and
    encoded segment by segment, as in use. In the loss are the assistant's turns, up to their first end token
    if they have one. The last turn is followed by an end token; the template's remainder is dropped. Raises
    DataError as `segments` does.
    """
    encode = student.tokenizer.encode
    if not isinstance(prompt.response, tuple):
        return DatasetResponse((*encode(prompt.response or ""), student.end_id), None)
    ids: list[int] = []
    trained: list[bool] = []
    end = 0
    for segment in segments(prompt, prompt.response, student.template):
        new = encode(segment.text)
        ends = (position for position, i in enumerate(new, start=1) if i in student.eos_ids)
        num_own = next(ends, len(new)) if segment.is_own else 0
        ids += new
        trained += [True] * num_own + [False] * (len(new) - num_own)
        end = len(ids) - len(new) + num_own
    if not end or ids[end - 1] not in student.eos_ids or not trained[end - 1]:
        return DatasetResponse((*ids[:end], student.end_id), (*trained[:end], True))
    return DatasetResponse(tuple(ids[:end]), tuple(trained[:end]))


def dataset_text(prompt: Prompt, student: Renderer) -> str:
    """Render the dataset response; empty if there is none. Raises DataError as `segments` does."""
    match prompt.response:
        case None:
            return ""
        case str(text):
            return text
        case turns:
            return "".join(piece.text for piece in segments(prompt, turns, student.template))


def length_bound(prompt: Prompt, student: Renderer) -> int:
    """Return an upper bound of the dataset response's length, without encoding it; 0 if there is none.

    A token has at least one byte, and an end token may be added. Raises DataError as `segments` does.
    """
    return 0 if prompt.response is None else len(dataset_text(prompt, student).encode()) + 1


def _rest(start: str, whole: str) -> str | None:
    """Return `whole` without the prefix `start`; None if it does not begin with it."""
    return whole[len(start) :] if whole.startswith(start) else None


def _change(start: str, whole: str) -> str:
    """Describe the first difference between `start` and the beginning of `whole`."""
    pairs = enumerate(zip(start, whole, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(start), len(whole)))
    was, now = (json.dumps(text[same : same + _EXCERPT], ensure_ascii=False) for text in (start, whole))
    return f"{was} becomes {now}"
