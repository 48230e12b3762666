"""Render conversations with the templates of student and teacher, and name the causes of differences."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

from mergeopd.data.chat_template import ChatTemplate
from mergeopd.errors import DataError
from mergeopd.inspection.pairs import Pair
from mergeopd.reporting.inspection import DiffSpan, TemplateDiff
from mergeopd.types import Message, Prompt

BOS = "BOS"
SYSTEM_DEFAULT = "system default"
TEACHER_PROMPT = "the teacher's own prompt"
TOOLS = "tools block"
GENERATION_PROMPT = "generation prompt"
THINKING = "thinking tags"
WHITESPACE = "whitespace"
MARKERS = "turn markers"
TEXT = "text"
REFUSED = "refused by the {}'s template"

PROMPT, SYSTEM, WITH_TOOLS, SECOND_TURN = "a prompt", "a system message", "tools", "a second turn"

# `<|im_start|>`, `</think>`, `<start_of_turn>`, `[INST]`; words; spaces; signs.
_MARKER = r"<[^<>\s]{1,40}>|\[/?[A-Z_]{3,}\]"
_PIECE = re.compile(rf"{_MARKER}|\w+|\s+|[^\w\s]")
MARKER = re.compile(_MARKER)
_THINK = re.compile(r"think|reasoning", re.IGNORECASE)
# The shortest of so many prompts is shown.
_NUM_CANDIDATES = 64

_MARK = "0b5e1a77"  # a text that no template writes
_SYSTEM_TEXT = "Reply in one sentence."
_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search the web.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    },
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that both templates render; `is_used`: prompts of the recipe have this form."""

    case: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    is_used: bool = True


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered conversation in parts: BOS, text before the first message's content, rest, opening.

    `opening` is the generation prompt, "" where the template has none.
    """

    bos: str
    preamble: str
    body: str
    opening: str

    @property
    def parts(self) -> tuple[str, str, str, str]:
        return self.bos, self.preamble, self.body, self.opening


@dataclass(frozen=True, slots=True)
class Comparison:
    """A conversation in both templates; None where a template refuses it.

    The renderings are without tools and the teacher's own prompt, which `diff` has.
    """

    conversation: Conversation
    student: Rendering | None
    teacher: Rendering | None
    diff: TemplateDiff


def compare_templates(pair: Pair) -> tuple[Comparison, ...]:
    """Render four conversations for student and teacher, without those that both templates refuse.

    The first is a prompt of the recipe as both models read it, with the teacher's own prompt if it has one;
    the others compare the templates alone.
    """
    compared = (_compare(pair, conversation) for conversation in _conversations(pair))
    return tuple(one for one in compared if _is_shown(pair, one))


def _is_shown(pair: Pair, one: Comparison) -> bool:
    """Whether a template renders a conversation; of one with tools that no prompt has, whether with them."""
    conversation = one.conversation
    if conversation.is_used or not conversation.tools:
        return one.student is not None or one.teacher is not None
    bare = replace(conversation, tools=())
    sides = (pair.student.template, pair.teacher.template)
    return any(_render(side, conversation) not in (None, _render(side, bare)) for side in sides)


def _conversations(pair: Pair) -> Iterator[Conversation]:
    prompts = pair.prompts
    shortest = min(prompts[:_NUM_CANDIDATES], key=num_characters, default=None)
    first = (Message("user", "How many days are in a week?"),) if shortest is None else shortest.messages
    yield Conversation(PROMPT, first, () if shortest is None else shortest.tools)
    user = next((m for m in first if m.role == "user"), first[0])
    user = Message("user", user.content)
    has_system = any(m.role == "system" for p in prompts for m in p.messages[:1])
    uses_system = has_system or pair.teacher.teacher_prompt.system is not None
    yield Conversation(SYSTEM, (Message("system", _SYSTEM_TEXT), user), is_used=uses_system)
    tools = next((p.tools for p in prompts if p.tools), ())
    yield Conversation(WITH_TOOLS, (user,), tools or (_TOOL,), is_used=bool(tools))
    turns = (user, Message("assistant", "Yes, it is."), Message("user", "Why?"))
    has_turns = any(m.role == "assistant" for p in prompts for m in p.messages)
    yield Conversation(SECOND_TURN, turns, is_used=has_turns or bool(tools))


def num_characters(prompt: Prompt) -> int:
    """Return the length of a prompt's messages."""
    return sum(len(message.content) for message in prompt.messages)


def _compare(pair: Pair, conversation: Conversation) -> Comparison:
    own, other = pair.student.template, pair.teacher.template
    for_teacher = _for_teacher(pair, conversation) if conversation.case == PROMPT else conversation
    student, teacher = _render(own, conversation), _render(other, for_teacher)
    if student is None or teacher is None:
        spans: tuple[DiffSpan, ...] = (DiffSpan(_text(student), _text(teacher)),)
        causes = [REFUSED.format("student" if student is None else "teacher")]
        refused = TemplateDiff(conversation.case, spans, tuple(causes))
        return Comparison(conversation, student, teacher, refused)
    is_same = for_teacher == conversation
    spans = joined(_diff_of_parts(student, teacher, is_same=is_same))
    bare = replace(conversation, tools=())
    student, teacher = _render(own, bare) or student, _render(other, bare) or teacher
    causes = list(_causes(student, teacher, bare))
    if not is_same:
        causes.append(TEACHER_PROMPT)
    if conversation.tools and _tools_differ(own, other, conversation):
        causes.append(TOOLS)
    if all(span.is_equal for span in spans):
        causes = []
    compared = TemplateDiff(conversation.case, spans, tuple(dict.fromkeys(causes)))
    return Comparison(conversation, student, teacher, compared)


def _diff_of_parts(student: Rendering, teacher: Rendering, *, is_same: bool) -> tuple[DiffSpan, ...]:
    """Compare renderings part by part; with other messages (not `is_same`), contents are in other parts."""
    sides = [
        side.parts if is_same else (side.bos, side.preamble + side.body, side.opening)
        for side in (student, teacher)
    ]
    return tuple(span for a, b in zip(*sides, strict=True) for span in diff(a, b))


def _for_teacher(pair: Pair, conversation: Conversation) -> Conversation:
    """Return the conversation with the teacher's system message and prompt."""
    changed = pair.teacher.teacher_prompt
    prompt = next((p for p in pair.prompts if p.messages == conversation.messages), None)
    return conversation if prompt is None else replace(conversation, messages=changed.messages(prompt))


def _render(template: ChatTemplate, conversation: Conversation) -> Rendering | None:
    """Render and split a conversation; None if the template refuses it."""
    messages, tools = conversation.messages, conversation.tools
    try:
        whole = template.render(messages, tools=tools)
        before = template.render(messages, tools=tools, add_generation_prompt=False)
    except DataError:
        return None
    opening = whole.removeprefix(before) if whole.startswith(before) else ""
    rest = whole[: len(whole) - len(opening)]
    bos = template.special_tokens.get("bos_token", "")
    bos = bos if bos and rest.startswith(bos) else ""
    rest = rest[len(bos) :]
    start = _num_before_content(template, conversation) - len(bos)
    return Rendering(bos, rest[: max(0, start)], rest[max(0, start) :], opening)


def _num_before_content(template: ChatTemplate, conversation: Conversation) -> int:
    """Count the characters that a template writes before the content of the first message."""
    first = replace(conversation.messages[0], content=_MARK, fields={})
    try:
        text = template.render((first, *conversation.messages[1:]), tools=conversation.tools)
    except DataError:
        return 0
    return max(0, text.find(_MARK))


def _text(rendering: Rendering | None) -> str:
    return "" if rendering is None else "".join(rendering.parts)


def _causes(student: Rendering, teacher: Rendering, conversation: Conversation) -> Iterator[str]:
    """Name why two renderings of the same messages differ."""
    if student.bos != teacher.bos:
        yield BOS
    if student.preamble != teacher.preamble:
        is_default = any("system" in side.preamble.lower() for side in (student, teacher))
        last = [MARKER.findall(side.preamble)[-1:] for side in (student, teacher)]
        if is_default and conversation.messages[0].role != "system":
            yield SYSTEM_DEFAULT
            if last[0] != last[1]:
                yield MARKERS
        else:
            yield from _of_spans(diff(student.preamble, teacher.preamble))
    yield from _of_spans(diff(student.body, teacher.body))
    if student.opening != teacher.opening:
        yield GENERATION_PROMPT
        if thinks(student.opening) != thinks(teacher.opening):
            yield THINKING


def thinks(text: str) -> bool:
    """Whether text has a tag that opens or closes reasoning."""
    return any(_THINK.search(marker) for marker in MARKER.findall(text))


def _of_spans(spans: Sequence[DiffSpan]) -> Iterator[str]:
    for span in spans:
        if span.is_equal:
            continue
        both = span.student + span.teacher
        if not both.strip():
            yield WHITESPACE
        elif thinks(both):
            yield THINKING
        else:
            yield MARKERS if MARKER.search(both) else TEXT


def _tools_differ(own: ChatTemplate, other: ChatTemplate, conversation: Conversation) -> bool:
    """Whether tools add another difference than the conversation has without them."""
    bare = replace(conversation, tools=())
    with_tools, without = (
        [
            (span.student, span.teacher)
            for span in diff(_text(_render(own, one)), _text(_render(other, one)))
            if not span.is_equal
        ]
        for one in (conversation, bare)
    )
    return with_tools != without


def diff(a: str, b: str) -> tuple[DiffSpan, ...]:
    """Compare two texts by words, signs and template markers; neighbouring differences are one span."""
    if a == b:
        return (DiffSpan(a, b),) if a else ()
    one, other = _PIECE.findall(a), _PIECE.findall(b)
    spans: list[DiffSpan] = []
    for _, i, i_stop, j, j_stop in SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        spans.append(DiffSpan("".join(one[i:i_stop]), "".join(other[j:j_stop])))
    return joined(spans)


def joined(spans: Sequence[DiffSpan]) -> tuple[DiffSpan, ...]:
    """Join neighbouring spans of the same kind, and differences that only a space or sign separates."""
    result: list[DiffSpan] = []
    for i, span in enumerate(spans):
        is_equal = span.is_equal
        if is_equal and result and not result[-1].is_equal and i + 1 < len(spans):
            is_equal = len(span.student) > 1 or span.student.isalnum() or spans[i + 1].is_equal
        if result and result[-1].is_equal == is_equal:
            span = DiffSpan(result[-1].student + span.student, result[-1].teacher + span.teacher)
            result.pop()
        result.append(span)
    return tuple(result)
