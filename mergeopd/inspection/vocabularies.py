"""Compare the vocabularies, special tokens and end tokens of student and teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mergeopd.data.renderer import Renderer, turn_end
from mergeopd.errors import DataError
from mergeopd.inspection.pairs import Pair
from mergeopd.models.facts import ModelFacts
from mergeopd.models.tokenizer import SPECIAL_NAMES, Tokenizer
from mergeopd.reporting.inspection import Finding, FindingLevel
from mergeopd.types import Message

_SHOWN = 4


def vocabulary(pair: Pair) -> Iterator[Finding]:
    """Compare ids, and the rows of the heads with them."""
    student, teacher = pair.student, pair.teacher
    rows_S, rows_T = pair.student_facts.vocab_rows, pair.teacher_facts.vocab_rows
    num_S, num_T = student.tokenizer.vocab_size, teacher.tokenizer.vocab_size
    difference = student.tokenizer.difference(teacher.tokenizer)
    if difference is None and pair.plan.bridge is None:
        yield Finding("vocabulary", "ok", f"the same tokenizer, {num_S:,} ids")
    elif difference is None:
        text = f"the same tokenizer, {num_S:,} ids: without the bridge, the loss is exact"
        yield Finding("vocabulary", "note", text, "remove `bridge`")
    elif (cross := pair.cross_tokenizer) is not None:
        num_same = len(cross.student.tokens.ids.keys() & cross.other.tokens.ids.keys())
        text = (
            f"another tokenizer, with the bridge '{cross.bridge.kind}': {num_S:,} ids for the student, "
            f"{num_T:,} for the teacher; {num_same:,} tokens have the same bytes"
        )
        yield Finding("vocabulary", "ok", text)
    else:
        shared = student.tokenizer.num_shared(teacher.tokenizer)
        assert shared is not None  # a check refuses others
        only = {
            name: _quoted(side.tokenizer.added_from(shared) or ())
            for name, side in (("the student", student), ("the teacher", teacher))
            if side.tokenizer.vocab_size > shared
        }
        listed = "; ".join(f"only {name} has {tokens}" for name, tokens in only.items())
        yield Finding(
            "vocabulary",
            "note",
            f"the first {shared:,} ids are the same; {listed}. The losses are over the ids that both have",
        )
    if rows_S > num_S or rows_T > num_T:
        padding = f"{max(0, rows_S - num_S):,} of the student, {max(0, rows_T - num_T):,} of the teacher"
        yield Finding("vocabulary", "ok", f"padding rows of the heads, in no loss: {padding}")
    for name, side, facts in (
        ("student", student, pair.student_facts),
        ("teacher", teacher, pair.teacher_facts),
    ):
        if beyond := side.tokenizer.added_from(facts.vocab_rows):
            yield Finding(
                "vocabulary",
                "note",
                f"the {name}'s tokenizer has {_quoted(beyond)} beyond the {facts.vocab_rows:,} rows of its "
                "head, so it can neither read nor generate these",
            )


def special_tokens(pair: Pair) -> Iterator[Finding]:
    """Compare the named special tokens, and what begins a prompt."""
    own, other = pair.student.tokenizer, pair.teacher.tokenizer
    if pair.cross_tokenizer is None:
        differing = [
            f"{name} is {_named(own, name)} for the student and {_named(other, name)} for the teacher"
            for name in SPECIAL_NAMES
            if own.special_tokens.get(name) != other.special_tokens.get(name)
        ]
        # Others are in no prompt: PAD is never read, and end tokens have findings of their own.
        level: FindingLevel = "note" if any(text.startswith("bos_token") for text in differing) else "ok"
        yield Finding("special_tokens", level, "; ".join(differing) or "the same special tokens")
    for name, side in (("student", pair.student), ("teacher", pair.teacher)):
        yield from _bos(name, side)


def _bos(name: str, side: Renderer) -> Iterator[Finding]:
    """Check that a model's prompts begin with BOS if its tokenizer begins texts with it, and only once."""
    bos = side.tokenizer.special_tokens.get("bos_token")
    try:
        text = side.template.render((Message("user", "?"),))
    except DataError:
        return
    if bos is None:
        return
    bos_id, ids = side.tokenizer.backend.token_to_id(bos), side.tokenizer.encode(text)
    if ids[:2] == [bos_id, bos_id]:
        message = f"the {name}'s chat template begins a prompt with {bos!r} twice"
        yield Finding("special_tokens", "problem", message, f"correct the {name}'s template")
    elif ids[:1] != [bos_id] and side.tokenizer.backend.encode("a").ids[:1] == [bos_id]:
        yield Finding(
            "special_tokens",
            "problem",
            f"the {name}'s tokenizer begins texts with {bos!r}, but its chat template does not write it, and "
            "prompts are read as the template renders them",
            f"give the {name} a `template` that begins with {{{{ bos_token }}}}",
        )


def end_tokens(pair: Pair) -> Iterator[Finding]:
    """Compare the tokens with which templates end turns, and those at which generation stops."""
    for name, side, facts in (
        ("student", pair.student, pair.student_facts),
        ("teacher", pair.teacher, pair.teacher_facts),
    ):
        yield from _configured(name, side, facts)
    student, teacher = pair.student, pair.teacher
    if pair.cross_tokenizer is not None:
        text = f"the student's {student.end_token!r} means the teacher's {teacher.end_token!r}"
        yield Finding("end_tokens", "ok", text)
    elif student.end_id not in teacher.closing_ids:
        yield Finding(
            "end_tokens",
            "problem",
            f"the student ends turns with {student.end_token!r} ({student.end_id}), the teacher with "
            f"{teacher.end_token!r} ({teacher.end_id}): the token that ends a response is left out of this "
            "teacher's terms, so it does not teach when to stop",
            "give the student the teacher's chat template (`student.template`), or its own end token "
            "(`student.end_tokens`)",
        )
    else:
        yield Finding("end_tokens", "ok", f"both end turns with {student.end_token!r} ({student.end_id})")


def _configured(name: str, side: Renderer, facts: ModelFacts) -> Iterator[Finding]:
    """Compare the end token of a template with those of generation_config.json."""
    written = turn_end(side.tokenizer, side.template, side.eos_ids)
    stops = _stops(side.tokenizer, facts.eos_ids)
    if written is None:
        text = f"the {name}'s chat template ends a turn with no special token; generation stops at {stops}"
        yield Finding("end_tokens", "note", text)
    elif facts.eos_ids and written not in facts.eos_ids:
        token = side.tokenizer.decode([written], skip_special_tokens=False)
        yield Finding(
            "end_tokens",
            "note",
            f"the {name}'s chat template ends turns with {token!r} ({written}), its generation_config.json "
            f"names {stops}: as base models do, whose responses rarely end by themselves",
            "check that this is the instruct model, or add the token to generation_config.json",
        )
    else:
        yield Finding("end_tokens", "ok", f"the {name}'s generation stops at {stops}")


def _stops(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    ids = ids or (tokenizer.eos_id,)
    return ", ".join(f"{tokenizer.decode([i], skip_special_tokens=False)!r} ({i})" for i in ids)


def _named(tokenizer: Tokenizer, name: str) -> str:
    text = tokenizer.special_tokens.get(name)
    return "none" if text is None else repr(text)


def _quoted(tokens: Sequence[str]) -> str:
    more = f" and {len(tokens) - _SHOWN} more" if len(tokens) > _SHOWN else ""
    return ", ".join(map(repr, tokens[:_SHOWN])) + more
