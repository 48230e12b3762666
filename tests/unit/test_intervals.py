"""Confidence intervals: known values, and how often they cover the truth."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mergeopd import intervals
from mergeopd.intervals import cluster_interval, difference_interval, paired_interval, pass_at_k, wilson


def test_wilson_of_a_proportion() -> None:
    """81 of 263: Newcombe (1998), table I, method 3."""
    interval = wilson([1.0] * 81 + [0.0] * 182)
    assert (interval.low, interval.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    none = wilson([0.0] * 20)
    assert (none.low, none.high) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_wilson_is_for_the_prompts_not_for_their_responses() -> None:
    """Four equal responses to each prompt say as much as one; independent ones say as much as four prompts."""
    random = np.random.default_rng(0)
    one = (random.random(200) < 0.3).astype(float)
    assert wilson(np.stack([one] * 4).mean(0)) == wilson(one)
    means = (random.random((4000, 4)) < 0.3).mean(1)
    width = wilson(means).high - wilson(means).low
    assert width == pytest.approx(2 * 1.96 * math.sqrt(0.3 * 0.7 / 16_000), rel=0.05)


def test_no_values() -> None:
    with pytest.raises(ValueError, match="no values"):
        wilson([])


@pytest.mark.parametrize("num", [64, 256, 1024])
@pytest.mark.parametrize("accuracy", [0.05, 0.2, 0.5, 0.8, 0.97])
def test_wilson_covers(num: int, accuracy: float) -> None:
    counts = np.random.default_rng(num).binomial(num, accuracy, size=2000)
    found = {count: wilson([1.0] * count + [0.0] * (num - count)) for count in set(counts.tolist())}
    covered = [found[count].low <= accuracy <= found[count].high for count in counts.tolist()]
    assert 0.93 <= np.mean(covered) <= 0.97


@pytest.mark.parametrize("num", [32, 256])
@pytest.mark.parametrize("difficulty", [(0.3, 0.3), (0.2, 2.0), (2.0, 0.5), (5.0, 0.3)])
def test_intervals_of_several_samples_cover(num: int, difficulty: tuple[float, float]) -> None:
    """avg@16 and pass@4 of prompts whose probabilities are skewed, up to almost all certain."""
    random = np.random.default_rng(num)
    everyone = random.beta(*difficulty, 500_000)
    truths = {1: everyone.mean(), 4: (1.0 - (1.0 - everyone) ** 4).mean()}
    covered: dict[int, list[bool]] = {1: [], 4: []}
    for _ in range(500):
        counts = random.binomial(16, random.beta(*difficulty, num))
        for k, truth in truths.items():
            interval = wilson(pass_at_k(counts, 16, k))
            covered[k].append(bool(interval.low <= truth <= interval.high))
    # Three standard errors of 500 repetitions are 0.03; skewed ones are covered more often.
    assert min(np.mean(of_k) for of_k in covered.values()) >= 0.92


def recovered(means: intervals.Values) -> intervals.Values:
    gain = means[:, 0, 1] - means[:, 0, 0]
    return np.where(gain > 0, (means[:, 0, 2] - means[:, 0, 0]) / np.where(gain > 0, gain, 1.0), np.nan)


@pytest.mark.parametrize(
    ("num", "base", "expert", "merged"),
    [(64, 0.2, 0.9, 0.85), (64, 0.3, 0.6, 0.3), (64, 0.1, 0.99, 0.97), (256, 0.2, 0.9, 0.85)],
)
def test_paired_intervals_cover(
    num: int, base: float, expert: float, merged: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models that agree on prompts more than independent ones would."""
    monkeypatch.setattr(intervals, "_NUM_RESAMPLES", 1500)
    random = np.random.default_rng(7)
    truth = (merged - base) / (expert - base)
    differences, ratios = [], []
    for _ in range(400):
        shared = random.random(num)
        uniforms = (np.where(random.random(num) < 0.6, shared, random.random(num)) for _ in range(3))
        b, e, m = (np.asarray(u < p, float) for u, p in zip(uniforms, (base, expert, merged), strict=True))
        difference, ratio = difference_interval(m, b), paired_interval([[b, e, m]], recovered)
        differences.append(difference.low <= merged - base <= difference.high)
        if ratio is not None:  # else the expert's gain is within noise
            ratios.append(ratio.low <= truth <= ratio.high)
    assert len(ratios) >= 380
    # Two standard errors of 400 repetitions are 0.022.
    assert 0.92 <= np.mean(differences) <= 0.985
    assert 0.92 <= np.mean(ratios) <= 0.985


def test_domains_are_resampled_on_their_own() -> None:
    """The interval of a sum over domains has the variance of the sum."""
    random = np.random.default_rng(0)
    values = [(random.random(500) < 0.5).astype(float) for _ in range(4)]
    one = paired_interval([[values[0]]], lambda means: means[:, 0, 0])
    total = paired_interval([[v] for v in values], lambda means: means[:, :, 0].sum(1))
    assert one is not None
    assert total is not None
    assert (total.high - total.low) / (one.high - one.low) == pytest.approx(2.0, rel=0.05)


def test_an_undefined_statistic_has_no_interval() -> None:
    same = np.array([0.0, 1.0] * 20)
    assert paired_interval([[same, same, same]], recovered) is None


@pytest.mark.parametrize("num", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_response(num: int) -> None:
    counts = np.arange(num + 1)
    for k in range(1, num + 1):
        subsets = list(itertools.combinations(range(num), k))
        shares = [np.mean([any(i < c for i in subset) for subset in subsets]) for c in counts]
        assert pass_at_k(counts, num, k) == pytest.approx(shares)
    with pytest.raises(ValueError, match="k must be"):
        pass_at_k(counts, num, num + 1)


def test_cluster_interval_of_equal_counts_is_students() -> None:
    """Means of 5 prompts with equal numbers of tokens: mean +- 2.776445 s / sqrt(5)."""
    means = np.array([0.3, -1.0, 2.0, 0.7, 0.1])
    interval = cluster_interval(7.0 * means, np.full(5, 7.0))
    assert interval is not None
    half = 2.776445 * means.std(ddof=1) / math.sqrt(5)
    assert interval.low == pytest.approx(means.mean() - half, abs=1e-5)
    assert interval.high == pytest.approx(means.mean() + half, abs=1e-5)
    assert cluster_interval(means[:1], np.ones(1)) is None


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (30, 2.0423), (200, 1.9719)],
)
def test_cluster_interval_has_the_quantiles_of_tables(degrees: int, quantile: float) -> None:
    sums = np.zeros(degrees + 1)
    sums[:2] = 1.0, -1.0
    interval = cluster_interval(sums, np.ones(degrees + 1))
    assert interval is not None
    spread = sums.std(ddof=1) / math.sqrt(degrees + 1)
    assert interval.high / spread == pytest.approx(quantile, abs=2e-4)
