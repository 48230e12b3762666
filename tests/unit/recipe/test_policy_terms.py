"""Ramps of weights, and defaults of policy terms."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mergeopd.recipe.loss_terms import Loss
from mergeopd.recipe.policy_terms import WeightRamp, amount_at
from mergeopd.recipe.resolve import read
from mergeopd.recipe.training import Phase

PROJECT = Path(__file__).parents[2] / "errors" / "project"


def test_the_fading_teacher_of_kdrl() -> None:
    """5e-3 to 1e-3 by 5e-5 an update: 80 updates, then it stays."""
    ramp = WeightRamp(start=5e-3, end=1e-3, updates=80)
    assert [amount_at(ramp, n) for n in (0, 40, 80, 200)] == pytest.approx(
        [0.005, 0.003, 0.001, 0.001], rel=1e-12
    )
    assert amount_at(ramp, 0) == 0.005
    assert amount_at(ramp, 80) == amount_at(ramp, 10**9) == 0.001


@given(st.floats(0, 10), st.floats(0, 10), st.integers(1, 1000), st.integers(0, 2000))
def test_ramps_stay_between_their_ends(start: float, end: float, updates: int, done: int) -> None:
    value = amount_at(WeightRamp(start=start, end=end, updates=updates), done)
    assert min(start, end) - 1e-12 <= value <= max(start, end) + 1e-12
    assert amount_at(start, done) == start


def test_a_switch_is_a_ramp_of_one_update() -> None:
    loss = Loss.model_validate(
        {"sampled_reverse_kl": {"weight": {"start": 1.0, "end": 0.0, "updates": 1}}, "reverse_kl": 0.5}
    )
    assert [loss.weight("sampled_reverse_kl", n) for n in (0, 1, 2)] == [1.0, 0.0, 0.0]
    assert [loss.weight("reverse_kl", n) for n in (0, 1)] == [0.5, 0.5]
    assert loss.weight("outcome", 0) == 0.0


@pytest.mark.parametrize("term", ["sampled_reverse_kl", "outcome", "reverse_kl"])
def test_a_ramp_to_or_from_zero_is_a_use(term: str) -> None:
    def used(start: float, end: float) -> bool:
        ramp = {"start": start, "end": end, "updates": 4}
        value = ramp if term == "reverse_kl" else {"weight": ramp}
        return Loss.model_validate({term: value, "forward_kl": 1.0}).uses(term)

    assert used(0.0, 1.0)
    assert used(1.0, 0.0)
    assert not used(0.0, 0.0)


def test_ramps_that_are_zero_throughout_are_refused() -> None:
    ramp = {"start": 0.0, "end": 0.0, "updates": 4}
    with pytest.raises(ValidationError, match="all weights are zero"):
        Loss.model_validate({"reverse_kl": ramp, "outcome": {"weight": ramp}})


def test_short_forms_and_defaults() -> None:
    phase = Phase.model_validate(
        {"name": "a", "updates": 1, "loss": "sampled_reverse_kl", "correction": "mask", "clip_ratio": None}
    )
    assert phase.loss.sampled_reverse_kl is not None
    assert phase.loss.sampled_reverse_kl.weight == 1.0
    assert phase.correction.model_dump() == {"kind": "mask", "low": 0.5, "high": 2.0}
    assert phase.clip_ratio is None
    plain = Phase.model_validate({"name": "a", "updates": 1, "loss": "outcome"})
    assert plain.clip_ratio is not None
    assert plain.clip_ratio.model_dump() == {"low": 0.2, "high": 0.28, "dual": None}
    assert plain.correction.kind == "none"


def problems_of(*overrides: str) -> list[str]:
    return [problem.message for problem in read(PROJECT / "recipes" / "merge.yaml", overrides, {}).problems]


def test_meaningful_settings_next_to_refused_ones_are_accepted() -> None:
    """Settings next to the refused ones, which do have a meaning."""
    one = "rollout.samples_per_prompt=1"
    rates = "phases.1.balance.pass_rate={}"
    assert problems_of(rates) == []
    assert problems_of(one, rates) != []
    assert problems_of(one, "phases.1.balance.pass_rate={a: 0.0}") == []  # only what is never solved counts
    assert problems_of(one, "phases.1.balance.distill_on=wrong") == []
    assert problems_of(one, "phases.1.loss={reverse_kl: 1.0, outcome: 0.0}") == []
    mixed = "phases.1.text={on_policy_fraction: {start: 0.0, end: 0.5, updates: 4}, otherwise: dataset}"
    assert problems_of(mixed, "phases.1.loss.outcome=0.5", rates) == []
    # Without a verifier a source's prompts keep their teachers; rewards come from the others.
    assert problems_of("prompts.2.verifier=null", "phases.1.loss.outcome=0.5", rates) == []
