"""Advantages that depend on whole answers: rewards to go, and weights for early tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeopd.batch.advantages import early_weights, reward_to_go, sequence_advantage
from mergeopd.loss.policy import bounded
from mergeopd.recipe.policy_terms import SampledTerm


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def term(**options: float) -> SampledTerm:
    return SampledTerm.model_validate({"weight": 1.0, **options})


def test_early_weights() -> None:
    assert early_weights(row(1.0, -1.0, 2.0), 0.5).tolist() == pytest.approx([1.5, 1.375, 1.25])
    assert early_weights(row(1.0, -1.0, 2.0), 0.0).tolist() == [1.0, 1.0, 1.0]
    assert early_weights(row(0.0, 0.0), 0.5).tolist() == [1.5, 1.5]
    assert early_weights(row(), 0.5).tolist() == []


@given(st.lists(st.floats(-5, 5), max_size=7), st.floats(0, 1), st.booleans(), st.booleans())
def test_reward_to_go_by_its_definition(
    gaps: list[float], discount: float, future_only: bool, per_token: bool
) -> None:
    found = reward_to_go(row(*gaps), discount, future_only=future_only, per_token=per_token)
    for t in range(len(gaps)):
        terms = [discount ** (u - t) * gaps[u] for u in range(t, len(gaps)) if not (future_only and u == t)]
        count = max(len(terms), 1) if per_token else 1
        assert found[t].item() == pytest.approx(math.fsum(terms) / count, abs=1e-12)


def test_without_discount_the_first_token_gets_the_log_ratio_of_the_whole_answer() -> None:
    gap = row(0.3, -1.0, 2.0)
    assert reward_to_go(gap, 1.0)[0].item() == pytest.approx(1.3)
    assert reward_to_go(gap, 0.0).tolist() == gap.tolist()
    assert reward_to_go(gap, 0.0, future_only=True).tolist() == [0.0, 0.0, 0.0]


def test_advantages_of_whole_answers_reduce_to_the_tokens() -> None:
    gaps, weights = [row(0.3, -4.0, 2.0), row(1.0, 1.0, -1.0)], [row(0.5, 0.5, 0.5), row(0.2, 0.2, 0.0)]
    plain = {"bound": 1.5}
    by_token = sum(w * bounded(g, 1.5) for g, w in zip(gaps, weights, strict=True))
    assert torch.allclose(sequence_advantage(gaps, weights, term(**plain)), by_token, atol=1e-15)
    # What the second teacher does not judge, the last token, is credited to nobody.
    found = sequence_advantage(gaps, weights, term(**plain, discount=1.0))
    first, second = [0.3 - 1.5 + 1.5, 0.0, 1.5], [2.0, 1.0, 0.0]
    expected = [0.5 * a + 0.2 * b for a, b in zip(first, second, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-15)
    silent = sequence_advantage(gaps, [0 * w for w in weights], term(**plain, early_gain=0.5))
    assert silent.tolist() == [0.0, 0.0, 0.0]
    assert sequence_advantage([row()], [row()], term(**plain, discount=0.5)).tolist() == []
