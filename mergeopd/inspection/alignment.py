"""Estimate the cosine of two gradients of which one is known only from sampled successes.

A *node* is a prompt with the beginning of a response. Its next token has the student's probabilities `P` over
some candidates, and the rest of the vocabulary as one more; `S_j` is the probability of success after
candidate j. In the logits, the gradient of the success probability is `g_j = P_j (S_j - sum_k P_k S_k)`
(2605.10889), and `d` is a teacher's, summed over the tokens of a candidate. The alignment is the cosine of
both over all nodes together,

    sum <g, d> / sqrt(sum |g|^2 sum |d|^2),

which is the success that a small step along `d` gains, relative to the best step of the same length.

`S` is estimated by means of sampled rewards. `g` is linear in them, so `<g, d>` is estimated without bias;
`|g|^2` is too large by the variance of the means, which is estimated and subtracted. Nodes are drawn with
known probabilities, and weighted by their inverse, so that sums refer to all nodes. Intervals treat prompts
as the sample. Only numpy is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergeopd.intervals import student_quantile
from mergeopd.reporting.result import Estimate

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Every candidate's variance is estimated from its own rewards.
_LEAST_CONTINUATIONS = 2
# The share of the draws that every node gets equally, so that the weight of a node is bounded.
_UNIFORM = 0.2


def ideal_gradient(probability: Floats, success: Floats) -> Floats:
    """Return `P_j (S_j - sum_k P_k S_k)`, `[..., candidates]`; probabilities sum to 1."""
    mean = (probability * success).sum(-1, keepdims=True)
    gradient: Floats = probability * (success - mean)
    return gradient


def squared_effect(probability: Floats) -> Floats:
    """Return by candidate the squared length of the change of the ideal gradient per unit of its success."""
    square = np.square(probability).sum(-1, keepdims=True)
    effect: Floats = np.square(probability) * (1.0 - 2.0 * probability + square)
    return effect


def expected_length(probability: Floats) -> Floats:
    """Return the root mean square of the ideal gradient if successes were independent with variance 1.

    It is 0 where one candidate has all the mass, and largest where two share it.
    """
    length: Floats = np.sqrt(np.maximum(squared_effect(probability), 0.0).sum(-1))
    return length


def divide(probability: Floats, is_fixed: NDArray[np.bool_], total: int) -> Ints:
    """Divide about `total` continuations among a node's candidates, at least 2 each.

    Numbers are proportional to a candidate's effect on the ideal gradient, which minimises the squared error
    where rewards have equal variances (Neyman 1934). Candidates whose reward is fixed, as no token follows,
    get 1.
    """
    effect = np.sqrt(np.maximum(squared_effect(probability), 0.0)) * ~is_fixed
    share = effect / effect.sum() if effect.sum() else np.zeros_like(effect)
    numbers = np.maximum(np.rint(share * total), _LEAST_CONTINUATIONS).astype(np.int64)
    return np.where(is_fixed, 1, numbers)


def draw_nodes(
    lengths: Sequence[Floats], strata: Ints, num_by_stratum: int, random: np.random.Generator
) -> tuple[Ints, Floats]:
    """Draw nodes with replacement, and return their indices and weights.

    Each stratum gets the same number of draws, or as many as it has nodes. A fifth of them is uniform, the
    rest in equal parts proportional to each of `lengths`, guesses at the sizes of gradients by node. A weight
    is the inverse of the expected number of draws of the node.
    """
    indices, weights = [], []
    for stratum in np.unique(strata):
        own = np.flatnonzero(strata == stratum)
        sizes = [length[own] for length in lengths if length[own].sum() > 0.0]
        uniform = np.full(len(own), 1.0 / len(own))
        parts = [size / size.sum() for size in sizes] or [uniform]
        share = _UNIFORM * uniform + (1.0 - _UNIFORM) * np.mean(parts, axis=0)
        num = min(num_by_stratum, len(own))
        drawn = random.choice(len(own), num, p=share / share.sum())
        indices.append(own[drawn])
        weights.append(1.0 / (num * share[drawn]))
    return np.concatenate(indices), np.concatenate(weights)


@dataclass(frozen=True, slots=True)
class Successes:
    """Mean rewards of the continuations of n nodes by candidate, `[n, candidates]`.

    `variance` is of the mean, estimated without bias; 0 where the reward is fixed. Candidates that a node
    lacks have probability 0.
    """

    probability: Floats
    mean: Floats
    variance: Floats

    @property
    def squared_length(self) -> Floats:
        """Unbiased estimates of `|g|^2` by node, which may be negative."""
        noise = (self.variance * squared_effect(self.probability)).sum(-1)
        squared: Floats = np.square(ideal_gradient(self.probability, self.mean)).sum(-1) - noise
        return squared

    @property
    def is_constant(self) -> NDArray[np.bool_]:
        """Whether all continuations of a node have the same reward, so that it has no ideal gradient."""
        present = self.probability > 0.0
        low = np.where(present, self.mean, np.inf).min(-1)
        high = np.where(present, self.mean, -np.inf).max(-1)
        is_constant: NDArray[np.bool_] = (low == high) & ~(self.variance * present).any(-1)
        return is_constant

    def inner(self, descent: Floats) -> Floats:
        """Unbiased estimates of `<g, d>` by node for a known direction `[n, candidates]`."""
        product: Floats = (ideal_gradient(self.probability, self.mean) * descent).sum(-1)
        return product


def mean_and_variance(rewards: Sequence[float]) -> tuple[float, float]:
    """Return the mean of rewards, and its variance estimated from them; 0 for one reward, which is fixed."""
    values = np.asarray(rewards, np.float64)
    return float(values.mean()), float(values.var(ddof=1) / len(values)) if len(values) > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the nodes of each prompt, `[prompts]`, of one teacher.

    `inner` and `ideal` are estimates of `<g, d>` and `|g|^2` from drawn nodes; `descent` is `|d|^2` of all
    nodes. `num_drawn` counts the drawn nodes.
    """

    inner: Floats
    ideal: Floats
    descent: Floats
    num_drawn: Ints

    def of(self, chosen: NDArray[np.bool_]) -> Totals:
        """Return the totals of some of the prompts."""
        return Totals(self.inner[chosen], self.ideal[chosen], self.descent[chosen], self.num_drawn[chosen])

    @property
    def cosine(self) -> float | None:
        """The alignment; None without a gradient, or where noise hides the ideal one."""
        ideal, descent = self.ideal.sum(), self.descent.sum()
        if ideal <= 0.0 or descent <= 0.0:
            return None
        return float(self.inner.sum() / math.sqrt(ideal * descent))

    def scale(self) -> Floats:
        """Return each prompt's part of the denominator `sqrt(sum |g|^2 sum |d|^2)`, to first order."""
        ratio = math.sqrt(self.descent.sum() / self.ideal.sum())
        part: Floats = 0.5 * (ratio * self.ideal + self.descent / ratio)
        return part


def alignment(totals: Totals) -> Estimate:
    """Return the cosine with a 95 % interval; both are cut to -1 to 1.

    The interval is Fieller's (1954) for a ratio of two sums over prompts: the values c for which the mean of
    `inner - c scale` is not significantly different from 0. It has all values where the denominator is not
    significantly above 0, and none (no bounds) with nodes of fewer than two prompts.
    """
    known = totals.of((totals.descent > 0.0) | (totals.num_drawn > 0))
    value = known.cosine
    if value is None:
        return Estimate(None)
    num = int((known.num_drawn > 0).sum())
    if num < 2:
        return Estimate(_cut(value))
    scale = known.scale()
    top, bottom = known.inner.sum(), scale.sum()
    covariance = np.cov(known.inner, scale) * len(scale) * student_quantile(num - 1) ** 2
    # (top - c bottom)^2 <= t^2 var(top - c bottom) is a quadratic inequality in c.
    square = bottom**2 - covariance[1, 1]
    middle = top * bottom - covariance[0, 1]
    rest = top**2 - covariance[0, 0]
    if square <= 0.0:
        return Estimate(_cut(value), -1.0, 1.0)
    half = math.sqrt(max(middle**2 - square * rest, 0.0))
    return Estimate(_cut(value), _cut((middle - half) / square), _cut((middle + half) / square))


def difference(first: Totals, second: Totals) -> Estimate:
    """Return the difference of two teachers' cosines on the same nodes, with a 95 % interval.

    Its variance is the jackknife's (Tukey 1958): by how much the difference changes without each prompt. What
    both teachers share cancels. No bounds with nodes of fewer than two prompts, or where the ideal gradient
    is lost without one prompt.
    """
    value = _gap(first, second)
    num, total = int((first.num_drawn > 0).sum()), len(first.inner)
    if value is None or num < 2:
        return Estimate(value)
    without = [_gap(first.of(others), second.of(others)) for others in ~np.eye(total, dtype=np.bool_)]
    known = [gap for gap in without if gap is not None]
    if len(known) < total:
        return Estimate(value)
    half = student_quantile(num - 1) * math.sqrt((total - 1) * float(np.var(known)))
    return Estimate(value, value - half, value + half)


def _gap(first: Totals, second: Totals) -> float | None:
    one, two = first.cosine, second.cosine
    return None if one is None or two is None else one - two


def _cut(value: float) -> float:
    return float(min(1.0, max(-1.0, value)))
