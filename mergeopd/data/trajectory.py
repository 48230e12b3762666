"""Answers that the prompt file has: texts, and logged trajectories with turns of tools and users between."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from mergeopd.data.chat_template import ChatTemplate
from mergeopd.data.renderer import Renderer
from mergeopd.errors import DataError
from mergeopd.types import Message, Prompt

_EXCERPT = 30
_ONE_EACH = (
    "make a row of each of the assistant's turns, with the turns before it in the prompt and its text as the "
    "response"
)


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a trajectory as the template writes it; `is_own`: the assistant writes it."""

    text: str
    is_own: bool


@dataclass(frozen=True, slots=True)
class DatasetResponse:
    """An answer in the student's ids. `trained` flags those in the loss; None: all."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...] | None


def segments(
    messages: Sequence[Message], trajectory: Sequence[Message], template: ChatTemplate
) -> tuple[Segment, ...]:
    """What the template writes after the prompt `messages`, cut where the assistant's turns begin and end.

    A turn begins where the template asks for an answer to all before it, as it does when the model is used,
    and ends where the conversation up to it ends. The pieces follow each other without a gap.

    Raises DataError when the template refuses the conversation, leaves a message out, or writes a turn
    otherwise once another follows: the policy would learn from texts that it never gets to see.
    """

    def written(num_turns: int, *, ask: bool) -> str:
        try:
            return template.render((*messages, *trajectory[:num_turns]), add_generation_prompt=ask)
        except DataError as error:
            raise DataError(f"{error}; change the conversation or the template") from error

    parts: list[Segment] = []
    last, told, end = 0, written(0, ask=True), written(0, ask=False)
    for i, turn in enumerate(trajectory):
        before, end = end, written(i + 1, ask=False)
        if turn.content.strip() and end == before:
            raise DataError(
                f"{template.name}: leaves out response[{i}], a message of role {turn.role!r}; "
                "choose a template that writes such messages"
            )
        if turn.role != "assistant":
            continue
        start = written(i, ask=True)
        if i:
            between = _rest(told, start)
            if between is None:
                raise DataError(
                    f"{template.name}: response[{last}] is written otherwise once response[{last + 1}] "
                    f"follows: {_change(told, start)}; {_ONE_EACH}, or give the student a template that "
                    "keeps earlier turns as they are"
                )
            parts.append(Segment(between, is_own=False))
        own = _rest(start, end)
        if own is None:
            raise DataError(
                f"{template.name}: response[{i}] does not begin as the template asks for an answer: "
                f"{_change(start, end)}; {_ONE_EACH}, or correct the template"
            )
        parts.append(Segment(own, is_own=True))
        last, told = i, end
    return tuple(parts)


def dataset_response(prompt: Prompt, student: Renderer) -> DatasetResponse:
    """The prompt's ready answer as ids.

    A text is closed with the student's end token. A trajectory comes from the student's template, encoded
    piece by piece, as it would come about in use; in the loss is what the assistant writes: each of its turns
    up to the first token that ends an answer, or all of it where the template writes none. After the last
    turn that token is added where it is missing, and the template's rest is dropped. Raises DataError as
    `segments` does.
    """
    encode = student.tokenizer.encode
    if not isinstance(prompt.response, tuple):
        return DatasetResponse((*encode(prompt.response or ""), student.end_id), None)
    ids: list[int] = []
    trained: list[bool] = []
    end = 0
    for segment in segments(prompt.messages, prompt.response, student.template):
        new = encode(segment.text)
        num_own = _turn_length(new, student) if segment.is_own else 0
        ids += new
        trained += [True] * num_own + [False] * (len(new) - num_own)
        end = len(ids) - len(new) + num_own
    if not end or ids[end - 1] not in student.eos_ids or not trained[end - 1]:
        return DatasetResponse((*ids[:end], student.end_id), (*trained[:end], True))
    return DatasetResponse(tuple(ids[:end]), tuple(trained[:end]))


def dataset_text(prompt: Prompt, student: Renderer) -> str:
    """The ready answer as the student's template writes it; empty where there is none.

    Raises DataError as `segments` does.
    """
    match prompt.response:
        case None:
            return ""
        case str(text):
            return text
        case turns:
            return "".join(piece.text for piece in segments(prompt.messages, turns, student.template))


def length_bound(prompt: Prompt, student: Renderer) -> int:
    """The ready answer has at most so many tokens, told without encoding it; 0 where there is none.

    A token stands for a byte at least, and one may be added to end the answer. Raises DataError as `segments`
    does.
    """
    return 0 if prompt.response is None else len(dataset_text(prompt, student).encode()) + 1


def _turn_length(ids: Sequence[int], student: Renderer) -> int:
    """Tokens of a turn up to the one that ends it."""
    ends = (position for position, i in enumerate(ids, start=1) if i in student.eos_ids)
    return next(ends, len(ids))


def _rest(start: str, whole: str) -> str | None:
    """`whole` without its start; None where it begins otherwise."""
    return whole[len(start) :] if whole.startswith(start) else None


def _change(start: str, whole: str) -> str:
    """From where on `whole` does not begin with `start`."""
    pairs = enumerate(zip(start, whole, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(start), len(whole)))
    was, now = (json.dumps(text[same : same + _EXCERPT], ensure_ascii=False) for text in (start, whole))
    return f"{was} becomes {now}"
