"""Sampled answers as the page shows them: every token with a colour and the numbers behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mergeopd.report.page.run_data import Sample, Trace

LEVELS = 12
MAX_TIMES = 12
MAX_TOKENS = 1000
_LEGEND_STEPS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
_SCALES = {"jsd": 0.2, "tvd": 0.3, "clipped_forward_kl": 0.1}
"""Nats at which a token has 63 % of the full colour. 1 but for those that are bounded."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token. `level` goes from 0 to `LEVELS`; `numbers` are value, log p of student and of teacher.

    `given`: others than the assistant wrote it, so it has no numbers.
    """

    text: str
    level: int
    numbers: str
    in_loss: bool = True
    given: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """An answer as one teacher reads it. Without teachers `teacher` is empty and the value -log p_S."""

    teacher: str
    mean: float | None
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """A sampled answer with a reading per teacher; `num_hidden` tokens at its end are not shown.

    `num_given` of its tokens are not the assistant's.
    """

    sample: Sample
    readings: tuple[Reading, ...]
    num_hidden: int
    num_given: int


@dataclass(frozen=True, slots=True)
class DomainAnswers:
    """One domain's answers by update, from early to late."""

    domain: str
    by_update: tuple[tuple[int, tuple[Answer, ...]], ...]


def build_answers(samples: Sequence[Sample]) -> tuple[DomainAnswers, ...]:
    """The answers to show, at most `MAX_TIMES` updates of each domain, the first and the last among them."""
    result = []
    for domain in sorted({sample.domain for sample in samples}):
        own = [sample for sample in samples if sample.domain == domain]
        updates = _spread(sorted({sample.update for sample in own}), MAX_TIMES)
        result.append(
            DomainAnswers(
                domain,
                tuple((u, tuple(_answer(sample) for sample in own if sample.update == u)) for u in updates),
            )
        )
    return tuple(result)


def level(value: float | None, divergence: str) -> int:
    """How strongly a token is coloured: the same everywhere and in every run, saturating smoothly."""
    if value is None:
        return LEVELS
    return round(LEVELS * (1.0 - math.exp(-max(0.0, value) / _SCALES.get(divergence, 1.0))))


@dataclass(frozen=True, slots=True)
class Legend:
    """Some values in nats, and their levels, for the divergences that share a scale."""

    divergences: tuple[str, ...]
    steps: tuple[tuple[float, int], ...]


def build_legends(samples: Sequence[Sample]) -> tuple[Legend, ...]:
    """The scales in use."""
    by_scale: dict[float, list[str]] = {}
    for divergence in dict.fromkeys(sample.divergence for sample in samples):
        by_scale.setdefault(_SCALES.get(divergence, 1.0), []).append(divergence)
    return tuple(
        Legend(tuple(names), tuple((f * scale, level(f * scale, names[0])) for f in _LEGEND_STEPS))
        for scale, names in by_scale.items()
    )


def _answer(sample: Sample) -> Answer:
    readings = [_reading(sample, name, trace) for name, trace in sorted(sample.teachers.items())]
    return Answer(
        sample=sample,
        readings=tuple(readings or [_reading(sample, "", None)]),
        num_hidden=max(0, len(sample.tokens) - MAX_TOKENS),
        num_given=0 if sample.trained is None else len(sample.trained) - sum(sample.trained),
    )


def _reading(sample: Sample, teacher: str, trace: Trace | None) -> Reading:
    """A teacher's reading; without a trace, what the student itself thinks of each token."""
    values = trace.divergence if trace else tuple(None if v is None else -v for v in sample.logprob_S)
    teachers = trace.logprob_T if trace else (None,) * len(values)
    masked = frozenset(trace.masked if trace else ())
    own = sample.trained or (True,) * len(values)
    tokens = tuple(
        Token(text, 0, "", in_loss=False, given=True)
        if not own[position]
        else Token(
            text=text,
            level=level(value, sample.divergence),
            numbers=" ".join(_number(n) for n in (value, student, teacher_logprob)),
            in_loss=position not in masked,
        )
        for position, (text, value, student, teacher_logprob) in enumerate(
            zip(sample.tokens, values, sample.logprob_S, teachers, strict=True)
        )
    )
    known = [value for i, value in enumerate(values) if value is not None and i not in masked and own[i]]
    return Reading(teacher, sum(known) / len(known) if known else None, tokens[:MAX_TOKENS])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _spread(updates: Sequence[int], count: int) -> list[int]:
    """At most `count` of them, evenly, with both ends."""
    if len(updates) <= count:
        return list(updates)
    return [updates[round(i * (len(updates) - 1) / (count - 1))] for i in range(count)]
