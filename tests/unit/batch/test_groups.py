"""Group advantages against the statistics module; pass rates against hand arithmetic."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeopd.batch.advantages import group_advantages, pass_rate_weight

REWARDS = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=9)


def test_the_two_conventions_of_grpo() -> None:
    rewards = [1.0, 0.0, 0.0, 1.0]
    assert group_advantages(rewards, "unbiased") == pytest.approx([0.866, -0.866, -0.866, 0.866], abs=1e-3)
    assert group_advantages(rewards, "biased") == pytest.approx([1.0, -1.0, -1.0, 1.0], abs=1e-5)
    assert group_advantages(rewards, "none") == [0.5, -0.5, -0.5, 0.5]


@given(REWARDS)
def test_advantages_by_the_statistics_module(rewards: list[float]) -> None:
    mean = statistics.fmean(rewards)
    for std, spread in (("unbiased", statistics.stdev), ("biased", statistics.pstdev)):
        expected = [(r - mean) / (spread(rewards) + 1e-6) for r in rewards]
        found = group_advantages(rewards, std)  # type: ignore[arg-type]
        assert found == pytest.approx(expected, abs=1e-9)
        assert sum(found) == pytest.approx(0.0, abs=1e-9)


@given(REWARDS, st.floats(-5, 5), st.floats(0.5, 20))
def test_neither_an_offset_nor_with_std_a_scale_changes_anything(
    rewards: list[float], offset: float, scale: float
) -> None:
    plain = group_advantages(rewards, "unbiased")
    assert group_advantages([r + offset for r in rewards], "unbiased") == pytest.approx(plain, abs=1e-6)
    # Up to the 1e-6 beside the standard deviation, which is at least 0.07 here.
    assert group_advantages([scale * r for r in rewards], "unbiased") == pytest.approx(plain, abs=2e-4)
    centred = group_advantages(rewards, "none")
    expected = [scale * c for c in centred]
    assert group_advantages([scale * r for r in rewards], "none") == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("std", ["unbiased", "biased", "none"])
@pytest.mark.parametrize("rewards", [[], [1.0], [1.0] * 4, [0.0] * 3, [0.1] * 7, [1 / 3] * 5])
def test_a_group_without_differences_has_no_advantage(rewards: list[float], std: str) -> None:
    """Exactly none: 0.1 seven times has a rounding error for a variance."""
    assert group_advantages(rewards, std) == [0.0] * len(rewards)  # type: ignore[arg-type]


def test_weights_of_pass_rates() -> None:
    weights = [pass_rate_weight(p, 1.0, 1.0) for p in (0.0, 0.125, 0.5, 1.0)]
    assert weights == [0.0, 0.109375, 0.25, 0.0]
    assert [pass_rate_weight(p, 0.0, 0.0) for p in (0.0, 0.3, 1.0)] == [1.0, 1.0, 1.0]
    assert [pass_rate_weight(p, 0.0, 1.0) for p in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]
    assert [pass_rate_weight(p, 2.0, 0.0) for p in (0.0, 0.5, 1.0)] == [0.0, 0.25, 1.0]


@given(st.floats(0.1, 4), st.floats(0.1, 4), st.floats(0, 1))
def test_the_heaviest_prompts_are_solved_a_over_a_plus_b_of_the_time(a: float, b: float, p: float) -> None:
    assert pass_rate_weight(p, a, b) <= pass_rate_weight(a / (a + b), a, b) + 1e-12
