"""Aggregate figures per token to the signal of a teacher: means with intervals by prompts, and curves."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mergeopd.batch.advantages import RIGHT
from mergeopd.intervals import Values, cluster_interval, wilson
from mergeopd.reporting.inspection import Onset, PositionBucket, Rendering, Signal
from mergeopd.reporting.result import Estimate

# A teacher's entropies before and after an onset are means over at least this share of its tokens.
_LEAST_SHARE = 0.05
_LEAST_PROMPTS = 4
# Figures that cannot be below zero; of these, shares cannot be above one.
_POSITIVE = ("reverse_kl", "forward_kl", "entropy_S", "entropy_T", "entropy_gap", "floor")
_SHARES = ("overlap", "mass_S", "mass_T")
_UNDEFINED = Estimate(None)


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """Figures of one response's tokens, by name; NaN where one is not defined.

    `prompt` is the prompt's number in the sample, `positions` are those of the tokens in the response.
    """

    prompt: int
    positions: NDArray[np.int64]
    values: Mapping[str, Values]

    def without(self, positions: Collection[int]) -> Scored:
        """Leave out the tokens at these places among the scored ones."""
        keep = ~np.isin(np.arange(len(self.positions)), list(positions))
        return Scored(self.prompt, self.positions[keep], {n: v[keep] for n, v in self.values.items()})


@dataclass(frozen=True, slots=True)
class Graded:
    """A response as it counts in pass rates."""

    prompt: int
    reward: float | None
    num_tokens: int
    is_truncated: bool


@dataclass(frozen=True, slots=True)
class MeasuredRendering:
    """What a teacher does with another rendering of the prompts."""

    name: str
    scored: Sequence[Scored]
    graded: Sequence[Graded]


@dataclass(frozen=True)
class Measured:
    """All that was measured of a teacher.

    `on_student` are figures on the student's responses (names: those of `Comparison`, and `logprob_gap`),
    `on_own` on the teacher's responses (`entropy_T`, `gap`). `foreign_ends` has a flag per ended response of
    the student, with its prompt.
    """

    k: int
    num_ids: int | None
    on_student: Sequence[Scored]
    on_own: Sequence[Scored]
    graded_S: Sequence[Graded]
    graded_T: Sequence[Graded]
    foreign_ends: Sequence[tuple[int, bool]] = ()
    renderings: Sequence[MeasuredRendering] = ()
    notes: tuple[str, ...] = field(default=())


def signal_of(measured: Measured, prompts: Collection[int]) -> Signal:
    """Return the signal over these prompts of the sample."""
    on_student = [one for one in measured.on_student if one.prompt in prompts]
    on_own = [one for one in measured.on_own if one.prompt in prompts]
    graded_S = [one for one in measured.graded_S if one.prompt in prompts]
    graded_T = [one for one in measured.graded_T if one.prompt in prompts]
    ends = [is_foreign for prompt, is_foreign in measured.foreign_ends if prompt in prompts]

    def of(name: str) -> Estimate:
        return token_mean(on_student, name)

    return Signal(
        num_prompts=len({one.prompt for one in graded_S}),
        num_responses=len(graded_S),
        num_tokens=sum(len(one.positions) for one in on_student),
        k=measured.k,
        overlap=of("overlap"),
        overlap_advantage=of("advantage"),
        entropy_gap=of("entropy_gap"),
        entropy_S=of("entropy_S"),
        entropy_T=of("entropy_T"),
        shared_mass_S=of("mass_S"),
        shared_mass_T=of("mass_T"),
        reverse_kl=of("reverse_kl"),
        forward_kl=of("forward_kl"),
        logprob_gap=of("logprob_gap"),
        pass_rate_S=pass_rate(graded_S),
        pass_rate_T=pass_rate(graded_T),
        teacher_logprob_gap=token_mean(on_own, "gap"),
        num_frontier=num_frontier(graded_S),
        positions=_positions(on_student, on_own),
        first_token_kl=token_mean(_firsts(on_student), "reverse_kl"),
        own_entropy_T=token_mean(on_own, "entropy_T"),
        pass_gain=_pass_gain(graded_S, graded_T),
        max_entropy=None if measured.num_ids is None else math.log(measured.num_ids),
        foreign_ends=float(np.mean(ends)) if ends else None,
        truncated_S=truncated_fraction(graded_S),
        truncated_T=truncated_fraction(graded_T),
        onset=entropy_onset(on_own),
        renderings=tuple(_rendering(one, prompts) for one in measured.renderings),
        notes=measured.notes,
    )


def _rendering(one: MeasuredRendering, prompts: Collection[int]) -> Rendering:
    scored = [each for each in one.scored if each.prompt in prompts]
    return Rendering(
        one.name,
        pass_rate([each for each in one.graded if each.prompt in prompts]),
        token_mean(scored, "reverse_kl"),
        token_mean(_firsts(scored), "reverse_kl"),
    )


def token_mean(scored: Sequence[Scored], name: str) -> Estimate:
    """Return the mean of a figure over the tokens where it is defined, with its interval by prompts."""
    sums = sums_by_prompt(scored, name)
    least = 0.0 if name in (*_POSITIVE, *_SHARES) else -math.inf
    return _ratio(
        {prompt: total for prompt, (total, _) in sums.items()},
        {prompt: num for prompt, (_, num) in sums.items()},
        least,
        1.0 if name in _SHARES else math.inf,
    )


def sums_by_prompt(scored: Sequence[Scored], name: str) -> dict[int, tuple[float, int]]:
    """Return the sum of a figure and the number of tokens where it is defined, by prompt."""
    sums: dict[int, tuple[float, int]] = {}
    for one in scored:
        values = one.values.get(name)
        if values is not None and (known := values[~np.isnan(values)]).size:
            total, num = sums.get(one.prompt, (0.0, 0))
            sums[one.prompt] = total + float(known.sum()), num + known.size
    return sums


def _ratio(
    sums: Mapping[int, float], counts: Mapping[int, int], least: float = -1.0, most: float = 1.0
) -> Estimate:
    """Return sum(sums) / sum(counts), by prompts, whose interval ends at the bounds."""
    if not sums:
        return _UNDEFINED
    by_prompt, sizes = np.array(list(sums.values())), np.array(list(counts.values()), np.float64)
    interval = cluster_interval(by_prompt, sizes)
    value = float(by_prompt.sum() / sizes.sum())
    if interval is None:
        return Estimate(value)
    return Estimate(value, max(interval.low, least), min(interval.high, most))


def pass_rate(graded: Sequence[Graded]) -> Estimate:
    """Return the mean reward, of prompts with equal weights."""
    means = list(rewards_by_prompt(graded).values())
    if not means:
        return _UNDEFINED
    values = [float(np.mean(rewards)) for rewards in means]
    interval = wilson(values)
    return Estimate(float(np.mean(values)), interval.low, interval.high)


def _pass_gain(graded_S: Sequence[Graded], graded_T: Sequence[Graded]) -> Estimate:
    """Return the difference of both pass rates on the prompts that both have responded to."""
    student, teacher = rewards_by_prompt(graded_S), rewards_by_prompt(graded_T)
    gains = {p: float(np.mean(teacher[p]) - np.mean(student[p])) for p in student.keys() & teacher.keys()}
    return _ratio(gains, dict.fromkeys(gains, 1))


def num_frontier(graded: Sequence[Graded]) -> int:
    """Count the prompts with correct and incorrect responses."""
    rewards = rewards_by_prompt(graded).values()
    return sum(0 < sum(one >= RIGHT for one in of_prompt) < len(of_prompt) for of_prompt in rewards)


def truncated_fraction(graded: Sequence[Graded]) -> float | None:
    return float(np.mean([one.is_truncated for one in graded])) if graded else None


def rewards_by_prompt(graded: Sequence[Graded]) -> dict[int, list[float]]:
    """Return the rewards by prompt; responses that could not be graded are left out."""
    rewards: dict[int, list[float]] = {}
    for one in graded:
        if one.reward is not None:
            rewards.setdefault(one.prompt, []).append(one.reward)
    return rewards


def _firsts(scored: Sequence[Scored]) -> list[Scored]:
    """Return the first token of each response."""
    return [
        Scored(one.prompt, one.positions[:1], {name: values[:1] for name, values in one.values.items()})
        for one in scored
        if len(one.positions) and one.positions[0] == 0
    ]


def position_bounds(longest: int) -> list[int]:
    """Return the bounds of buckets of positions below `longest`: powers of two."""
    bounds = [0, 1]
    while bounds[-1] < longest:
        bounds.append(2 * bounds[-1])
    return bounds


def _positions(on_student: Sequence[Scored], on_own: Sequence[Scored]) -> tuple[PositionBucket, ...]:
    """Return the means in buckets of positions whose bounds are powers of two."""
    both = [one for one in (*on_student, *on_own) if len(one.positions)]
    longest = max((int(one.positions[-1]) + 1 for one in both), default=0)
    buckets = []
    for start, stop in pairwise(position_bounds(longest)):
        own = [_within(one, start, stop) for one in on_student]
        teacher = [_within(one, start, stop) for one in on_own]
        buckets.append(
            PositionBucket(
                start,
                stop,
                sum(len(one.positions) for one in own),
                reverse_kl=token_mean(own, "reverse_kl").value,
                overlap=token_mean(own, "overlap").value,
                entropy_S=token_mean(own, "entropy_S").value,
                entropy_T=token_mean(own, "entropy_T").value,
                advantage=token_mean(own, "advantage").value,
                own_entropy_T=token_mean(teacher, "entropy_T").value,
            )
        )
    return tuple(buckets)


def _within(one: Scored, start: int, stop: int) -> Scored:
    rows = slice(*np.searchsorted(one.positions, [start, stop]).tolist())
    return Scored(
        one.prompt, one.positions[rows], {name: values[rows] for name, values in one.values.items()}
    )


def entropy_onset(on_own: Sequence[Scored]) -> Onset | None:
    """Find the token of a teacher's own responses from which its entropy differs most from that before.

    At each position the means before and after are over the responses that reach beyond it, so that they
    are of the same prompts; of all positions the split counts that explains most of the variance (least
    squares). None where no split leaves enough tokens and prompts on both sides.
    """
    usable = [one for one in on_own if len(one.positions) and "entropy_T" in one.values]
    length = max((int(one.positions[-1]) + 1 for one in usable), default=0)
    if length < 2:
        return None
    counts, sums = np.zeros((2, 2, length - 1))
    longest: dict[int, int] = {}
    total = 0
    for one in usable:
        places, entropies = one.positions, one.values["entropy_T"]
        last = int(places[-1])
        before = np.cumsum(np.bincount(places, minlength=last + 1))[:-1]
        sum_before = np.cumsum(np.bincount(places, entropies, minlength=last + 1))[:-1]
        counts[:, :last] += before, len(places) - before
        sums[:, :last] += sum_before, entropies.sum() - sum_before
        total += len(places)
        longest[one.prompt] = max(longest.get(one.prompt, 0), last)
    is_possible = (counts >= _LEAST_SHARE * total).all(0)
    num_prompts = (np.array(list(longest.values()))[:, None] > np.arange(length - 1)).sum(0)
    is_possible &= num_prompts >= _LEAST_PROMPTS
    if not is_possible.any():
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums / counts
        explained = counts.prod(0) / counts.sum(0) * np.square(means[1] - means[0])
    best = int(np.where(is_possible, explained, -1.0).argmax())
    (low, high), (num_low, num_high) = means[:, best].tolist(), counts[:, best].tolist()
    return Onset(best + 1, low, high, int(num_low), int(num_high))
