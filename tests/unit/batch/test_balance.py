"""Budgets that follow the gap (Open-MOPD M2): the golden vector, and what must not change."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeopd.batch.weights import ResponseSize, follow_gap, response_weights, token_share_weights

MASS = {"math": 10000.0, "code": 9000.0, "if": 400.0}
GAPS = {"math": 0.2, "code": 0.1, "if": 0.05}
NUMBERS = st.lists(st.floats(0.01, 10), min_size=3, max_size=3)


def test_golden_vector() -> None:
    weights = follow_gap(token_share_weights(MASS, None), MASS, GAPS, 1.0)
    assert weights == pytest.approx({"math": 1.108571, "code": 0.615873, "if": 6.928571}, abs=1e-6)
    total = sum(MASS.values())
    shares = {domain: weights[domain] * MASS[domain] / total for domain in MASS}
    assert shares == pytest.approx({"math": 0.571429, "code": 0.285714, "if": 0.142857}, abs=1e-6)


def test_the_golden_vector_through_answers() -> None:
    """One answer of every domain, its gap summed over its tokens."""
    answers = [ResponseSize(d, int(MASS[d]), GAPS[d] * MASS[d]) for d in MASS]
    weights, factors = response_weights(answers, "token", "equal", 1.0)
    assert factors == pytest.approx({"math": 1.108571, "code": 0.615873, "if": 6.928571}, abs=1e-6)
    assert weights == pytest.approx([factors[d] / 19400 for d in MASS])


@given(NUMBERS, NUMBERS, st.floats(0, 2))
def test_scale_order_and_reductions(raw_mass: list[float], raw_gaps: list[float], alpha: float) -> None:
    mass, gaps = dict(zip("abc", raw_mass, strict=True)), dict(zip("abc", raw_gaps, strict=True))
    m1 = token_share_weights(mass, None)
    found = follow_gap(m1, mass, gaps, alpha)
    assert sum(found[d] * mass[d] for d in mass) == pytest.approx(sum(mass.values()))
    assert follow_gap(m1, mass, gaps, 0.0) == m1
    # Names do not count: permuting the domains permutes the weights.
    turn = dict(zip("abc", "bca", strict=True))

    def turned(values: dict[str, float]) -> dict[str, float]:
        return {turn[d]: value for d, value in values.items()}

    assert follow_gap(turned(m1), turned(mass), turned(gaps), alpha) == pytest.approx(turned(found))
    # Neither does the gaps' unit, nor a gap that all share.
    assert follow_gap(m1, mass, {d: 7.0 * g for d, g in gaps.items()}, alpha) == pytest.approx(found)
    assert follow_gap(m1, mass, dict.fromkeys("abc", 0.3), alpha) == pytest.approx(m1)
    # Equal M1 shares: what is left is (gap / reference)^alpha, so larger gaps get more.
    shares = {d: found[d] * mass[d] for d in mass}
    for d in "abc":
        for e in "abc":
            if gaps[d] > gaps[e]:
                assert shares[d] >= shares[e] * (1 - 1e-9)


def test_ratios_are_bounded() -> None:
    """A gap of nothing still gets a twentieth of the reference's factor; no NaN from gaps that are all 0."""
    m1 = {"a": 1.0, "b": 1.0}
    found = follow_gap(m1, m1, {"a": 1.0, "b": 0.0}, 1.0)  # reference 0.5: factors 2 and 0.05
    assert found["a"] / found["b"] == pytest.approx(40.0)
    many = dict.fromkeys("abcdefghijklmnopqrstuvwxyz", 1.0)
    gaps = {d: 1000.0 if d == "a" else 0.0 for d in many}  # 26 times the reference, squared
    found = follow_gap(many, many, gaps, 2.0)
    assert found["a"] / found["b"] == pytest.approx(20.0 / 0.05)
    assert follow_gap(m1, m1, {"a": 0.0, "b": 0.0}, 1.0) == m1
    assert follow_gap({}, {}, {}, 1.0) == {}


def test_a_gap_that_rounding_left_below_zero_is_none() -> None:
    """An exact KL of equal models is a few 1e-7 on either side of 0, and roots of such are complex."""
    m1 = {"a": 1.0, "b": 1.0}
    for alpha in (0.5, 1.0, 1.5):
        found = follow_gap(m1, m1, {"a": 0.1, "b": -3e-7}, alpha)
        assert found == follow_gap(m1, m1, {"a": 0.1, "b": 0.0}, alpha)
    assert follow_gap(m1, m1, {"a": -1e-9, "b": -3e-7}, 0.5) == m1


def test_a_single_domain_and_absent_ones() -> None:
    assert follow_gap({"a": 1.0}, {"a": 5.0}, {"a": 0.3}, 1.0) == {"a": 1.0}
    weights, factors = response_weights(
        [ResponseSize("a", 4, 1.0), ResponseSize("b", 0)], "token", "equal", 1.0
    )
    assert factors == {"a": 1.0}
    assert weights == [0.25, 0.0]
    assert response_weights([ResponseSize("a", 0)], "token", "off", 1.0) == ([0.0], {})
