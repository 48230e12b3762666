"""Dataset responses: texts, and logged trajectories with turns of tools and users."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from mergeopd.data.chat_template import ChatTemplate
from mergeopd.data.renderer import Renderer
from mergeopd.errors import DataError
from mergeopd.types import REASONING_KEYS, Message, Prompt

_EXCERPT = 30
# White space and empty reasoning; of that, templates may write the closing tag alone.
_BLANK = re.compile(r"(?:<think>\s*)?</think>|\s+")
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
    The segments are contiguous. Where a template changes white space or empty reasoning blocks of earlier
    messages, these stay as they were when the turn after them began, as in a rollout.

    Raises DataError if the template rejects the conversation, omits a message or its calls, or renders a turn
    differently once another follows; the policy would otherwise train on texts that do not occur in use.
    """
    rendered = _Rendered(prompt, tuple(trajectory), template)
    parts: list[Segment] = []
    last, shown = 0, ""
    for i, turn in enumerate(trajectory):
        if turn.role != "assistant":
            continue
        start, end = rendered.text(i, prompted=True), rendered.text(i + 1)
        if i:
            between = text_after(shown, start)
            for j in range(last + 1, i):
                rendered.check_shown(j, between)
            if between is None:
                raise DataError(
                    f"{template.name}: response[{last}] is rendered differently once response[{last + 1}] "
                    f"follows: {_change(shown, start)}; {_ONE_EACH}, or give the student a template that "
                    "does not change earlier turns"
                )
            parts.append(Segment(between, is_own=False))
        own = rendered.turn(i, start, end)
        rendered.check_shown(i, own)
        if own is None:
            raise DataError(
                f"{template.name}: response[{i}] does not begin with the generation prompt: "
                f"{_change(start, end)}; {_ONE_EACH}, or correct the template or its `template_arguments`"
            )
        rendered.check_calls_shown(i, own, end)
        parts.append(Segment(own, is_own=True))
        last, shown = i, start + own
    return tuple(parts)


class _Rendered(NamedTuple):
    """Renderings of a prompt with the first turns of a trajectory."""

    prompt: Prompt
    trajectory: tuple[Message, ...]
    template: ChatTemplate

    def text(self, num_turns: int, *, prompted: bool = False) -> str:
        return self._of((*self.prompt.messages, *self.trajectory[:num_turns]), prompted)

    def turn(self, i: int, start: str, end: str) -> str | None:
        """Return the text of turn i: what `end` has after `start`, which ends with the generation prompt.

        Some templates leave out the reasoning of earlier turns as soon as the last turn is complete; the
        policy writes that turn while the reasoning is still there. None: the turn does not begin there.
        """
        own = text_after(start, end)
        if own is not None:
            return own
        earlier = (*self.prompt.messages, *self.trajectory[:i])
        forgotten = tuple(message.without(*REASONING_KEYS) for message in earlier)
        if forgotten == earlier or self._of((*forgotten, self.trajectory[i]), prompted=False) != end:
            return None
        return text_after(self._of(forgotten, prompted=True), end)

    def check_shown(self, i: int, text: str | None) -> None:
        """Raise DataError if the template leaves message i out; `text` is the segment that has it, if any."""
        turn = self.trajectory[i]
        content = turn.content.strip()
        if turn.is_empty or (content and text and (content in text or _quoted(content) in text)):
            return
        if self.text(i) == self.text(i + 1):
            raise DataError(
                f"{self.template.name}: leaves out response[{i}], a message of role {turn.role!r}; "
                "choose a template that renders such messages"
            )

    def check_calls_shown(self, i: int, own: str, end: str) -> None:
        """Raise DataError if the template leaves out the calls of turn i."""
        turn = self.trajectory[i]
        names = [str(call.get("function", call)["name"]) for call in turn.tool_calls]
        if all(name in own and name not in turn.content for name in names):
            return
        messages = (*self.prompt.messages, *self.trajectory[:i], turn.without("tool_calls"))
        try:
            are_shown = self._of(messages, prompted=False) != end
        except DataError:
            return
        if not are_shown:
            raise DataError(
                f"{self.template.name}: leaves out the calls of tools in response[{i}]; choose a template "
                "that renders them, or write them into the text of the message as the model does"
            )

    def _of(self, messages: Sequence[Message], prompted: bool) -> str:
        try:
            return self.template.render(messages, tools=self.prompt.tools, add_generation_prompt=prompted)
        except DataError as error:
            raise DataError(f"{error}; change the conversation or the template") from error


def text_after(start: str, whole: str) -> str | None:
    """Return what follows `start` in `whole`; None if it does not begin with it.

    White space and empty reasoning blocks may differ, because templates write and remove them depending on
    what follows a message; but not a block at the end of `start`, where it belongs to a generation prompt.
    """
    if whole.startswith(start):
        return whole[len(start) :]
    cut = _num_same(start, whole)
    while cut and (start[cut - 1].isspace() or start[cut - 1] in "</think>"):  # no blank piece is cut in two
        cut -= 1
    start, whole = start[cut:], whole[cut:]
    bare = _BLANK.sub("", start)
    if not _BLANK.sub("", whole).startswith(bare):
        return None
    blank, rest = (text[_position(text, len(bare)) :] for text in (start, whole))
    return rest.removeprefix(blank) if rest.startswith(blank) or not blank.strip() else None


def _num_same(one: str, other: str) -> int:
    """Return the length of the common beginning of two texts."""
    least, most = 0, min(len(one), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        if one[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def _position(text: str, num_bare: int) -> int:
    """Return the position after that many characters of a text that are not blank."""
    position = 0
    for blank in _BLANK.finditer(text):
        if position + num_bare <= blank.start():
            break
        num_bare -= blank.start() - position
        position = blank.end()
    return position + num_bare


def dataset_response(prompt: Prompt, student: Renderer) -> DatasetResponse:
    """Encode the prompt's dataset response.

    A text is followed by the student's end token. A trajectory is rendered by the student's template and
    encoded segment by segment, as in use. In the loss are the assistant's turns, up to their first end token
    if they have one; it can be the token with which the next message begins (GLM). The last turn is followed
    by an end token; the template's remainder is dropped. Raises DataError as `segments` does.
    """
    encode = student.tokenizer.encode
    if not isinstance(prompt.response, tuple):
        return DatasetResponse((*encode(prompt.response or ""), student.end_id), None)
    ids: list[int] = []
    trained: list[bool] = []
    end, has_ended = 0, False
    for segment in segments(prompt, prompt.response, student.template):
        new = encode(segment.text)
        end_at = next((position for position, i in enumerate(new, start=1) if i in student.eos_ids), None)
        if segment.is_own:
            num_own, has_ended = end_at or len(new), end_at is not None
            end = len(ids) + num_own
        else:
            num_own = int(end_at == 1 and not has_ended)
        ids += new
        trained += [True] * num_own + [False] * (len(new) - num_own)
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


def _change(start: str, whole: str) -> str:
    """Describe the first difference between `start` and the beginning of `whole`."""
    same = _num_same(start, whole)
    was, now = (f'"{_quoted(text[same : same + _EXCERPT])}"' for text in (start, whole))
    return f"{was} becomes {now}"


def _quoted(text: str) -> str:
    """Return the text as in JSON, without the quotes around it."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
