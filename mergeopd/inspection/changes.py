"""Changes from base to merged student: figures per token, pass rates, and how responses look."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import chain, zip_longest

import numpy as np

from mergeopd.engine.update_stats import repetition
from mergeopd.inspection.signal import (
    Graded,
    Scored,
    pass_rate,
    rewards_by_prompt,
    sums_by_prompt,
    token_mean,
)
from mergeopd.intervals import Interval, Values, cluster_influences, cluster_interval, influence_interval
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.reporting.comparison import difference, mean_reward, recovered_share
from mergeopd.reporting.contribution import (
    Change,
    ChangedResponse,
    DomainChange,
    MeasuredOn,
    StudentResponse,
    TeacherChange,
)
from mergeopd.reporting.result import Estimate
from mergeopd.storage.responses import EvaluatedResponse
from mergeopd.tool_calls import parse_tool_calls
from mergeopd.types import token_ids

REFUSALS = (
    "i can't",
    "i cannot",
    "i can not",
    "i won't",
    "i will not",
    "i'm sorry",
    "i am sorry",
    "sorry,",
    "i apologize",
    "i apologise",
    "my apologies",
    "i'm unable",
    "i am unable",
    "i'm not able",
    "i am not able",
    "i must decline",
    "i have to decline",
    "unfortunately, i can",
    "as an ai",
    "as a language model",
)
"""Openings of responses that count as refusals, in lower case. A heuristic: of English responses only."""
_THOUGHT = re.compile(r"\A\s*(?:<think>)?.*?</think>", re.DOTALL)
_COMPARED_WORDS = 400
_COMPARED_PROMPTS = 300
_UNKNOWN = Estimate(None)


@dataclass(frozen=True)
class Side:
    """A teacher's figures with one student: on the student's responses, and on the teacher's."""

    on_student: Sequence[Scored]
    on_teacher: Sequence[Scored]
    graded: Sequence[Graded]


def teacher_change(
    base: Side, merged: Side, teacher: Sequence[Graded], prompts: Collection[int]
) -> TeacherChange:
    """Return what changed between a teacher and the student on these prompts of the sample."""
    base, merged = _within(base, prompts), _within(merged, prompts)
    teacher = [one for one in teacher if one.prompt in prompts]
    return TeacherChange(
        num_prompts=len({one.prompt for one in merged.graded}),
        num_responses=len(merged.graded),
        num_tokens=sum(len(one.positions) for one in merged.on_student),
        reverse_kl=token_change(base.on_student, merged.on_student, "reverse_kl"),
        overlap=token_change(base.on_student, merged.on_student, "overlap"),
        logprob_gap=token_change(base.on_student, merged.on_student, "logprob_gap"),
        teacher_logprob_gap=token_change(base.on_teacher, merged.on_teacher, "gap"),
        pass_rate=reward_change(*_paired(*map(rewards_by_prompt, (base.graded, merged.graded)))),
        pass_rate_T=pass_rate(teacher),
        closed=closed_share(base.on_student, merged.on_student),
        recovered=_recovered(*map(rewards_by_prompt, (base.graded, teacher, merged.graded))),
    )


def _within(side: Side, prompts: Collection[int]) -> Side:
    return Side(
        [one for one in side.on_student if one.prompt in prompts],
        [one for one in side.on_teacher if one.prompt in prompts],
        [one for one in side.graded if one.prompt in prompts],
    )


def token_change(base: Sequence[Scored], merged: Sequence[Scored], name: str) -> Change:
    """Return how the mean of a figure over tokens changed, with the paired interval by prompts."""
    before, after = _sums(base, merged, name)
    if not (before[1].any() and after[1].any()):
        return Change(token_mean(base, name), token_mean(merged, name))
    change = _mean(after) - _mean(before)
    influences = cluster_influences(*after) - cluster_influences(*before)
    return Change(
        token_mean(base, name),
        token_mean(merged, name),
        _estimate(change, influence_interval(change, influences)),
    )


def closed_share(base: Sequence[Scored], merged: Sequence[Scored]) -> Estimate:
    """Return the share of the base's reverse KL that is gone; not defined where it had none."""
    before, after = _sums(base, merged, "reverse_kl")
    if not (before[1].any() and after[1].any()) or _mean(before) <= 0.0:
        return _UNKNOWN
    rest = _mean(after) / _mean(before)
    influences = (cluster_influences(*after) - rest * cluster_influences(*before)) / _mean(before)
    interval = influence_interval(1.0 - rest, -influences)
    return _estimate(1.0 - rest, interval and Interval(interval.low, min(interval.high, 1.0)))


def rest_nats(merged: Sequence[Scored], prompts: Collection[int]) -> float | None:
    """Return the reverse KL that is left at the tokens of the sample, in nats; None without distributions."""
    own = [one.values for one in merged if one.prompt in prompts]
    values = [figures["reverse_kl"] for figures in own if "reverse_kl" in figures]
    return float(sum(np.nansum(each) for each in values)) if values else None


Sums = tuple[Values, Values]


def _sums(base: Sequence[Scored], merged: Sequence[Scored], name: str) -> tuple[Sums, Sums]:
    """Return sums and counts of tokens by prompt, of all prompts in which one of the two has tokens."""
    both = [sums_by_prompt(scored, name) for scored in (base, merged)]
    prompts = sorted(both[0].keys() | both[1].keys())
    arrays = [np.array([sums.get(p, (0.0, 0)) for p in prompts], np.float64).reshape(-1, 2) for sums in both]
    (before, after) = ((array[:, 0], array[:, 1]) for array in arrays)
    return before, after


def _mean(sums: Sums) -> float:
    return float(sums[0].sum() / sums[1].sum())


def _estimate(value: float, interval: Interval | None) -> Estimate:
    return Estimate(value) if interval is None else Estimate(value, interval.low, interval.high)


def _paired(
    base: Mapping[int, Sequence[float]], merged: Mapping[int, Sequence[float]]
) -> tuple[Values, Values]:
    """Return the means of the prompts that both have values of."""
    prompts = sorted(base.keys() & merged.keys())
    return (
        np.array([np.mean(base[p]) for p in prompts]),
        np.array([np.mean(merged[p]) for p in prompts]),
    )


def reward_change(base: Values, merged: Values) -> Change:
    """Return the change of a mean of values in [0, 1], by prompts."""
    if not len(base):
        return Change()
    return Change(mean_reward(base), mean_reward(merged), difference(merged, base))


def _recovered(
    base: Mapping[int, Sequence[float]],
    teacher: Mapping[int, Sequence[float]],
    merged: Mapping[int, Sequence[float]],
) -> Estimate:
    prompts = sorted(base.keys() & teacher.keys() & merged.keys())
    values = [np.array([np.mean(of[p]) for p in prompts]) for of in (base, teacher, merged)]
    return recovered_share([values] if prompts else [])


Rows = Sequence[EvaluatedResponse]
Figure = Callable[[EvaluatedResponse], float | None]


def domain_change(
    name: str,
    base: Rows,
    merged: Rows,
    tokenizer: Tokenizer,
    measured_on: MeasuredOn,
    *,
    is_trained: bool,
) -> DomainChange:
    """Return how the responses to the prompts of a domain, or a suite, changed."""
    own, other = _by_prompt(base), _by_prompt(merged)
    keys = sorted(own.keys() & other.keys())

    def values(figure: Figure) -> tuple[Values, Values]:
        pairs = [(_mean_of(own[key], figure), _mean_of(other[key], figure)) for key in keys]
        known = [pair for pair in pairs if None not in pair]
        array = np.array(known, np.float64).reshape(-1, 2)
        return array[:, 0], array[:, 1]

    def repeated(row: EvaluatedResponse) -> float | None:
        return repetition([token_ids(tokenizer.encode(row.response))])

    return DomainChange(
        name=name,
        domain=merged[0].domain if merged else name,
        measured_on=measured_on,
        is_trained=is_trained,
        num_prompts=len(keys),
        pass_rate=reward_change(*values(_reward)),
        length=mean_change(*values(lambda row: row.num_tokens)),
        truncated=reward_change(*values(lambda row: float(row.finish == "length"))),
        tool_calls=reward_change(*values(lambda row: float(calls_tools(row.response)))),
        refusals=reward_change(*values(lambda row: float(is_refusal(row.response)))),
        repetition=reward_change(*values(repeated)),
    )


def mean_change(base: Values, merged: Values) -> Change:
    """Return the change of a mean over prompts."""
    if not len(base):
        return Change()

    def mean(values: Values) -> Estimate:
        return _estimate(float(values.mean()), cluster_interval(values, np.ones(len(values))))

    return Change(mean(base), mean(merged), mean(merged - base))


def is_refusal(response: str) -> bool:
    """Whether a response begins as a refusal does, after its reasoning."""
    text = _THOUGHT.sub("", response, count=1).lstrip(" \t\n*_#>\"'").lower().replace("\u2019", "'")
    return text.startswith(REFUSALS)


def calls_tools(response: str) -> bool:
    """Whether a response has a tool call, also one that cannot be read."""
    turn = parse_tool_calls(response)
    return bool(turn.calls or turn.problems)


def _reward(row: EvaluatedResponse) -> float | None:
    """Return a reward; a response that its verifier failed on counts as incorrect, as in a result."""
    return 0.0 if row.reward is None and row.failure is not None else row.reward


def _by_prompt(rows: Rows) -> dict[str, list[EvaluatedResponse]]:
    groups: dict[str, list[EvaluatedResponse]] = {}
    for row in rows:
        groups.setdefault(row.key, []).append(row)
    return groups


def _mean_of(rows: Rows, figure: Figure) -> float | None:
    values = [value for row in rows if (value := figure(row)) is not None]
    return float(np.mean(values)) if values else None


def changed_responses(
    name: str, base: Rows, merged: Rows, measured_on: MeasuredOn, number: int
) -> list[ChangedResponse]:
    """Choose the prompts whose responses changed most, at most `number`.

    The largest losses and gains of reward are taken in turn. Where they are too few, responses with other
    words follow, the least similar first.
    """
    own, other = _by_prompt(base), _by_prompt(merged)
    pairs = [_pair(name, measured_on, own[key], other[key]) for key in own if key in other]
    lost = sorted((p for p in pairs if (p.change or 0.0) < 0), key=lambda p: p.change or 0.0)
    gained = sorted((p for p in pairs if (p.change or 0.0) > 0), key=lambda p: -(p.change or 0.0))
    in_turn = [p for p in chain.from_iterable(zip_longest(lost, gained)) if p is not None]
    if len(in_turn) < number:
        others = [p for p in pairs if not p.change and p.base.text != p.merged.text]
        in_turn += sorted(others[:_COMPARED_PROMPTS], key=_similarity)
    return in_turn[:number]


def _pair(name: str, measured_on: MeasuredOn, base: Rows, merged: Rows) -> ChangedResponse:
    """Pair the responses to a prompt that show best how its mean reward changed."""
    before, after = _mean_of(base, _reward), _mean_of(merged, _reward)
    change = None if before is None or after is None else after - before
    first, second = base[0], merged[0]
    if change:
        extremes = (max, min) if change < 0 else (min, max)
        first, second = (
            extreme(rows, key=lambda row: _reward(row) or 0.0)
            for extreme, rows in zip(extremes, (base, merged), strict=True)
        )
    return ChangedResponse(
        name, measured_on, first.key, first.prompt, first.reference, change, _shown(first), _shown(second)
    )


def _similarity(pair: ChangedResponse) -> float:
    base, merged = (text.split()[:_COMPARED_WORDS] for text in (pair.base.text, pair.merged.text))
    return float(SequenceMatcher(a=base, b=merged, autojunk=False).ratio())


def _shown(row: EvaluatedResponse) -> StudentResponse:
    return StudentResponse(row.response, row.reward, row.failure, row.finish, row.num_tokens)
