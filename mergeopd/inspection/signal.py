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
    sums: dict[int, float] = {}
    counts: dict[int, int] = {}
    for one in scored:
        values = one.values.get(name)
        if values is not None and (known := values[~np.isnan(values)]).size:
            sums[one.prompt] = sums.get(one.prompt, 0.0) + float(known.sum())
            counts[one.prompt] = counts.get(one.prompt, 0) + known.size
    return _ratio(sums, counts)


def _ratio(sums: Mapping[int, float], counts: Mapping[int, int]) -> Estimate:
    if not sums:
        return _UNDEFINED
    by_prompt, sizes = np.array(list(sums.values())), np.array(list(counts.values()), np.float64)
    interval = cluster_interval(by_prompt, sizes)
    value = float(by_prompt.sum() / sizes.sum())
    return Estimate(value) if interval is None else Estimate(value, interval.low, interval.high)


def pass_rate(graded: Sequence[Graded]) -> Estimate:
    """Return the mean reward, of prompts with equal weights."""
    means = list(_rewards(graded).values())
    if not means:
        return _UNDEFINED
    values = [float(np.mean(rewards)) for rewards in means]
    interval = wilson(values)
    return Estimate(float(np.mean(values)), interval.low, interval.high)


def _pass_gain(graded_S: Sequence[Graded], graded_T: Sequence[Graded]) -> Estimate:
    """Return the difference of both pass rates on the prompts that both have responded to."""
    student, teacher = _rewards(graded_S), _rewards(graded_T)
    gains = {p: float(np.mean(teacher[p]) - np.mean(student[p])) for p in student.keys() & teacher.keys()}
    return _ratio(gains, dict.fromkeys(gains, 1))


def num_frontier(graded: Sequence[Graded]) -> int:
    """Count the prompts with correct and incorrect responses."""
    rewards = _rewards(graded).values()
    return sum(0 < sum(one >= RIGHT for one in of_prompt) < len(of_prompt) for of_prompt in rewards)


def truncated_fraction(graded: Sequence[Graded]) -> float | None:
    return float(np.mean([one.is_truncated for one in graded])) if graded else None


def _rewards(graded: Sequence[Graded]) -> dict[int, list[float]]:
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


def _positions(on_student: Sequence[Scored], on_own: Sequence[Scored]) -> tuple[PositionBucket, ...]:
    """Return the means in buckets of positions whose bounds are powers of two."""
    both = [one for one in (*on_student, *on_own) if len(one.positions)]
    longest = max((int(one.positions[-1]) + 1 for one in both), default=0)
    bounds = [0, 1]
    while bounds[-1] < longest:
        bounds.append(2 * bounds[-1])
    buckets = []
    for start, stop in pairwise(bounds):
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
    """Find the token from which a teacher's entropy on its own responses differs most from that before.

    This is the split that explains most of the variance between positions (least squares). None without a
    split that leaves a share of the tokens on both sides.
    """
    usable = [one for one in on_own if len(one.positions) and "entropy_T" in one.values]
    if not usable:
        return None
    positions = np.concatenate([one.positions for one in usable])
    entropies = np.concatenate([one.values["entropy_T"] for one in usable])
    positions, entropies = positions[~np.isnan(entropies)], entropies[~np.isnan(entropies)]
    counts = np.bincount(positions).astype(np.float64)
    before, sums = np.cumsum(counts)[:-1], np.cumsum(np.bincount(positions, entropies))[:-1]
    total, total_sum = counts.sum(), entropies.sum()
    after = total - before
    is_possible = (before >= _LEAST_SHARE * total) & (after >= _LEAST_SHARE * total)
    if not is_possible.any():
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        means, rest = sums / before, (total_sum - sums) / after
    gain = np.where(is_possible, before * after * np.square(rest - means), -1.0)
    best = int(gain.argmax())
    return Onset(best + 1, float(means[best]), float(rest[best]), int(before[best]), int(after[best]))
