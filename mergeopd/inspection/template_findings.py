"""Findings about the templates of student and teacher, from the conversations they were compared on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from mergeopd.data.renderer import Renderer
from mergeopd.errors import DataError
from mergeopd.inspection import templates
from mergeopd.inspection.pairs import Pair
from mergeopd.inspection.templates import Comparison, Rendering, thinks
from mergeopd.reporting.inspection import Finding
from mergeopd.types import Message

_SHOWN = 80
# Markers that are always single tokens of the models that were trained with them; DeepSeek's have U+FF5C.
_TOKEN = re.compile(r"<[|\uff5c][^<>\s]+[|\uff5c]>|<(?:start|end)_of_turn>|\[/?INST\]")
_REMEDY = "`template_arguments` or `template`, of the card or of `student`, can make both equal"


def template_findings(pair: Pair, compared: Sequence[Comparison]) -> Iterator[Finding]:
    """Yield what matters for training: how responses begin, BOS, defaults, parts that are left out."""
    for name, side in (("student", pair.student), ("teacher", pair.teacher)):
        yield from _split_markers(name, side)
    used = [one for one in compared if one.conversation.is_used]
    findings = (finding for one in used for finding in _of_case(pair, one))
    yield from dict.fromkeys(findings)  # a difference of all conversations is reported once
    equal = [one.diff.case for one in used if one.diff.is_equal]
    if equal:
        yield Finding("template", "ok", f"student and teacher render {_listed(equal)} the same")
    if any(templates.TEACHER_PROMPT in one.diff.causes for one in used):
        text = "the teacher reads a prompt of its own (`system` or `prompt` in the recipe)"
        yield Finding("template", "ok", text)


def _of_case(pair: Pair, one: Comparison) -> Iterator[Finding]:
    case = one.diff.case
    if one.student is None or one.teacher is None:
        name = "student" if one.student is None else "teacher"
        yield Finding(
            "template",
            "problem",
            f"the {name}'s chat template refuses {case}, which prompts of the recipe have",
            f"give the {name} a `template` that renders it, or change the prompts",
        )
        return
    causes = set(one.diff.causes)
    if templates.GENERATION_PROMPT in causes:
        yield from _opening(pair, one.student, one.teacher)
    if templates.BOS in causes and pair.cross_tokenizer is None:
        name, other = ("student", "teacher") if one.student.bos else ("teacher", "student")
        bos = one.student.bos or one.teacher.bos
        text = f"the {name}'s prompts begin with {bos!r}, the {other}'s do not"
        yield Finding("template", "problem", text, f"give the {other} a `template` that begins with it")
    if templates.SYSTEM_DEFAULT in causes:
        yield from _system_default(one.student, one.teacher)
    if templates.MARKERS in causes and pair.cross_tokenizer is None:
        yield Finding(
            "template",
            "note",
            "the templates mark turns differently although the tokenizer is the same",
            "check that each template is the one that its model was trained with",
        )
    if templates.WHITESPACE in causes:
        yield Finding("template", "note", f"the templates differ in whitespace ({case})", _REMEDY)
    if templates.THINKING in causes and templates.GENERATION_PROMPT not in causes:
        text = f"the templates render the reasoning of earlier turns differently ({case})"
        yield Finding("template", "note", text, _REMEDY)
    yield from _left_out(pair, one)


def _opening(pair: Pair, student: Rendering, teacher: Rendering) -> Iterator[Finding]:
    """Compare the texts behind which responses begin."""
    own, other = student.opening, teacher.opening
    text = f"responses begin behind {_short(own)} for the student, behind {_short(other)} for the teacher"
    if thinks(own) != thinks(other):
        name = "student" if thinks(own) else "teacher"
        yield Finding(
            "template",
            "problem",
            f"{text}: only the {name}'s opens or closes its reasoning there",
            _same_thinking(pair),
        )
    elif pair.cross_tokenizer is None and (own.startswith(other) or other.startswith(own)):
        yield Finding("template", "problem", f"{text}: the teacher expects other first tokens", _REMEDY)
    elif pair.cross_tokenizer is None:
        yield Finding("template", "note", text, _REMEDY)


def _same_thinking(pair: Pair) -> str:
    """Return the remedy for thinking on one side only, with the templates' own switch if they have one."""
    variables = pair.student.template.variables | pair.teacher.template.variables
    switch = next((name for name in sorted(variables) if thinks(f"<{name}>")), None)
    if switch is None:
        return _REMEDY
    return f"make both the same, with `template_arguments: {{{switch}: ...}}` of the card or of `student`"


def _system_default(student: Rendering, teacher: Rendering) -> Iterator[Finding]:
    """Name the texts that templates write before a conversation without a system message."""
    texts = (_words(side.preamble) for side in (student, teacher))
    named = [_short(text) if text else "none" for text in texts]
    if named[0] != named[1]:
        yield Finding(
            "template",
            "note",
            "without a system message, the templates write different ones: "
            f"{named[0]} for the student, {named[1]} for the teacher",
            "keep it if the teacher was trained with it; a system message in the prompts replaces most "
            "defaults",
        )


def _words(text: str) -> str:
    """Return text before a prompt without markers and roles."""
    words = " ".join(templates.MARKER.sub(" ", text).split())
    return words.removeprefix("system").removesuffix("user").strip()


def _left_out(pair: Pair, one: Comparison) -> Iterator[Finding]:
    """Name the side whose template renders a system message or tools as if there were none."""
    conversation = one.conversation
    parts = []
    if conversation.messages[0].role == "system":
        parts.append(("system messages", conversation.messages[1:], conversation.tools))
    if conversation.tools:
        parts.append(("tools", conversation.messages, ()))
    for what, messages, tools in parts:
        for name, side in (("student", pair.student), ("teacher", pair.teacher)):
            try:
                whole = side.template.render(conversation.messages, tools=conversation.tools)
                is_left_out = whole == side.template.render(messages, tools=tools)
            except DataError:
                continue
            if is_left_out:
                yield Finding(
                    "template",
                    "problem",
                    f"the {name}'s chat template leaves {what} out, which prompts of the recipe have",
                    f"give the {name} a `template` that renders them",
                )


def _split_markers(name: str, side: Renderer) -> Iterator[Finding]:
    """Report markers of a template that its tokenizer splits: the template is probably another model's."""
    conversation = Message("user", "?"), Message("assistant", "."), Message("user", "?")
    try:
        text = side.template.render(conversation)
    except DataError:
        return
    split = {m: len(side.tokenizer.encode(m)) for m in dict.fromkeys(_TOKEN.findall(text))}
    split = {marker: num for marker, num in split.items() if num > 1}
    if split:
        listed = ", ".join(f"{marker!r} into {num}" for marker, num in split.items())
        yield Finding(
            "template",
            "problem",
            f"the {name}'s chat template writes markers that are no tokens of its tokenizer, which splits "
            f"{listed}: it is probably the template of another model",
            f"name the {name}'s own template (`template`)",
        )


def _short(text: str) -> str:
    quoted = json.dumps(text, ensure_ascii=False)
    half = _SHOWN // 2 - 2
    return quoted if len(quoted) <= _SHOWN else f"{quoted[:half]} ... {quoted[-half:]}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
