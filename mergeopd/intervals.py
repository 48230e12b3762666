"""95 % confidence intervals for accuracies, their differences, and recovered headroom.

Values are per prompt: the mean reward, in [0, 1], of a model's responses to it. The prompts are the sample;
several responses to one prompt are not independent and count as one value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Z = 1.959963984540054  # the standard normal's 97.5 % quantile
_NUM_RESAMPLES = 4000
_NUM_ADDED = 2
_SEED = 0

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    high: float


def wilson(values: Sequence[float] | Values) -> Interval:
    """Return Wilson's score interval (1927) for the mean of values in [0, 1].

    With values of 0 and 1 it is the usual interval of a proportion. Values between (partial rewards, means
    over several responses, pass@k) vary less, which counts as more prompts: the number that a proportion
    would need for the same variance (Kish's effective sample size, 1965). A correct and a wrong prompt are
    added for it, since samples of a skewed distribution often lack the rare values that cause its variance.

    Raises:
        ValueError: there are no values.
    """
    array = np.asarray(values, np.float64)
    if not array.size:
        raise ValueError("no values")
    size = array.size + _NUM_ADDED
    likely, square = float(array.sum() + 1.0) / size, float(np.square(array).sum() + 1.0) / size
    num = array.size * likely * (1.0 - likely) / (square - likely**2)
    mean = float(array.mean())
    spread = mean * (1.0 - mean)
    centre = mean + _Z**2 / (2 * num)
    half = _Z * math.sqrt(spread / num + _Z**2 / (4 * num**2))
    scale = 1.0 + _Z**2 / num
    return Interval(max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))


def pass_at_k(num_correct: Values, num_samples: int, k: int) -> Values:
    """Estimate each prompt's pass@k, the probability that one of `k` responses is correct.

    The unbiased estimator of Chen et al. (2021, 2107.03374) for `c` correct ones of `n` responses is
    1 - C(n - c, k) / C(n, k), the share of the subsets of size `k` that contain a correct one.

    Raises:
        ValueError: `k` is not in 1 to `num_samples`.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must be in 1 to {num_samples}, not {k}")
    total = math.comb(num_samples, k)
    wrong = [math.comb(num_samples - c, k) / total for c in range(num_samples + 1)]
    estimates: Values = 1.0 - np.array(wrong)[np.asarray(num_correct, np.int64)]
    return estimates


def paired_interval(
    domains: Sequence[Sequence[Values]], statistic: Callable[[Values], Values]
) -> Interval | None:
    """Return the bootstrap interval (percentiles) of a statistic of several models' means.

    `domains` has the models' values `[prompts]` in each domain, on the same prompts in the same order.
    Prompts are resampled within each domain, with all models' values on them. `statistic` maps the means
    `[resamples, domains, models]` to `[resamples]`; NaN where it is not defined. None if that is so in more
    than 2.5 % of the resamples, since no interval of those that remain has 95 %.

    Two prompts on which each model's value is a coin flip are added to every domain before resampling: for
    two models and small samples the interval then covers as that of Agresti and Min (2005), which adds half a
    prompt to each of the four outcomes, while without them it covers 57 to 92 % of the time where models
    rarely differ. The random numbers are fixed, so equal values give equal intervals.
    """
    random = np.random.default_rng(_SEED)
    means = []
    for models in domains:
        # Prompts with equal values are drawn together: there are few of these, and many prompts.
        values, numbers = np.unique(
            np.stack([np.asarray(v, np.float64) for v in models], axis=1), axis=0, return_counts=True
        )
        total = int(numbers.sum()) + _NUM_ADDED
        shares = np.array([*numbers, _NUM_ADDED]) / total
        counts = random.multinomial(total, shares, size=_NUM_RESAMPLES)
        added = random.binomial(counts[:, -1:], 0.5, size=(_NUM_RESAMPLES, values.shape[1]))
        means.append((counts[:, :-1] @ values + added) / total)
    results = statistic(np.stack(means, axis=1))
    undefined = np.isnan(results)
    if undefined.mean() > 0.025:
        return None
    low, high = np.quantile(results[~undefined], [0.025, 0.975])
    return Interval(float(low), float(high))


def difference_interval(values: Values, others: Values) -> Interval:
    """Return the paired bootstrap interval of mean(values) - mean(others) on the same prompts."""
    interval = paired_interval([[values, others]], lambda means: means[:, 0, 0] - means[:, 0, 1])
    assert interval is not None
    return interval


def cluster_interval(sums: Values, counts: Values) -> Interval | None:
    """Return the interval of sum(sums) / sum(counts), a mean over tokens, by prompts.

    `sums` and `counts` are per prompt: the tokens of a prompt are not independent. None for fewer than two
    prompts.
    """
    return influence_interval(float(sums.sum() / counts.sum()), cluster_influences(sums, counts))


def cluster_influences(sums: Values, counts: Values) -> Values:
    """Return each prompt's influence on sum(sums) / sum(counts), by linearisation of the ratio."""
    total = float(counts.sum())
    influences: Values = (sums - float(sums.sum()) / total * counts) / total
    return influences


def influence_interval(value: float, influences: Values) -> Interval | None:
    """Return the interval of an estimate from the influences of the prompts on it, whose sum is zero.

    The influences on a difference of two estimates from the same prompts are the differences of those on
    each, so that its interval is paired. The quantile is Student's for the number of prompts; None for fewer
    than two.
    """
    num = len(influences)
    if num < 2:
        return None
    spread = math.sqrt(num / (num - 1) * float(np.square(influences).sum()))
    half = student_quantile(num - 1) * spread
    return Interval(value - half, value + half)


def student_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's distribution, by bisection of its distribution function."""
    low, high = _Z, 13.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if _student_inside(middle, degrees) < 0.95 else (low, middle)
    return high


def _student_inside(value: float, degrees: int) -> float:
    """Return P(|t| < value) for whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(value / math.sqrt(degrees))
    cosine, is_odd = math.cos(angle), degrees % 2
    term = total = (cosine if is_odd else 1.0) if degrees > 1 else 0.0
    for i in range(2 + is_odd, degrees - 1, 2):
        term *= cosine**2 * (i - 1) / i
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if is_odd else math.sin(angle) * total
