"""What a phase's loss is told to be, at each of its updates."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from mergeopd.batch.objective import correction, phase_objective
from mergeopd.loss import policy
from mergeopd.loss.divergence import ForwardKL, ReverseKL
from mergeopd.loss.objective import DistillationObjective
from mergeopd.loss.pointwise import SkewForwardKL, SkewReverseKL
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.training import Phase

FADING = {"start": 1.0, "end": 0.0, "updates": 4}


def phase(**document: object) -> Phase:
    return Phase.model_validate({"name": "phase", "updates": 8, **document})


def told(document: Phase, updates_done: int = 0) -> policy.Policy:
    found = phase_objective(document, updates_done, has_policy=document.loss.has_policy).policy
    assert found is not None
    return found


def test_everything_written_arrives() -> None:
    whole = phase(
        loss={"outcome": {"teacher": {"kind": "credit", "mix": 0.3, "bound": 0.1}}, "sampled_reverse_kl": {"weight": 0.5, "bound": 2.0}},
        clip_ratio={"low": 0.1, "high": 0.4, "dual": 3.0},
        correction={"kind": "mask", "low": 0.25, "high": 4.0},
    )  # fmt: skip
    assert told(whole) == policy.Policy(
        sampled=0.5,
        bound=2.0,
        clip=policy.ClipRatio(0.1, 0.4, 3.0),
        correction=policy.Correction("mask", 0.25, 4.0),
        anchor=policy.Credit(0.3, 0.1),
    )
    region = phase(loss={"outcome": {"teacher": {"kind": "trust_region", "alpha": 0.7}}}, clip_ratio=None)
    assert told(region) == policy.Policy(anchor=policy.TrustRegion(0.7))
    for kind in ("truncate", "mask", "sequence_mask"):
        assert correction(phase(loss="outcome", correction=kind)).kind == kind


def test_every_weight_may_move() -> None:
    """Distil, then learn from rewards: the teacher's terms fade, and its say in the credit with them."""
    moving = phase(
        loss={
            "reverse_kl": FADING,
            "sampled_reverse_kl": {"weight": FADING},
            "outcome": {"teacher": {"kind": "credit", "mix": FADING}},
        }
    )
    for done, amount in ((0, 1.0), (1, 0.75), (3, 0.25), (4, 0.0), (7, 0.0)):
        objective = phase_objective(moving, done, has_policy=True)
        assert objective.coefficients == ((amount,) if amount else ())
        assert told(moving, done).sampled == amount
        assert told(moving, done).anchor == policy.Credit(amount, 0.2)


def test_a_skew_term_without_skew_is_the_plain_kl() -> None:
    terms = ("skew_forward_kl", "skew_reverse_kl")
    plain = phase_objective(phase(loss={name: {"alpha": 0.0} for name in terms}), 0, has_policy=False)
    assert (plain.names, plain.divergences) == (terms, (ForwardKL(), ReverseKL()))
    skewed = phase_objective(phase(loss={name: {"alpha": 0.3} for name in terms}), 0, has_policy=False)
    assert skewed.divergences == (SkewForwardKL(0.3), SkewReverseKL(0.3))
    with pytest.raises(ValidationError, match="lost in float32"):
        phase(loss={"skew_forward_kl": {"alpha": 1e-7}})


def test_a_loss_without_policy_terms_has_none() -> None:
    found: DistillationObjective = phase_objective(
        phase(loss={"reverse_kl": 0.5, "jsd": 1.0}), 0, has_policy=False
    )
    assert found.policy is None
    assert (found.names, found.coefficients) == (("reverse_kl", "jsd"), (0.5, 1.0))


def test_the_policy_before_a_round_is_measured_only_where_needed() -> None:
    """It costs a forward pass of the student."""
    is_needed = Plan.model_construct(teachers={}, sources=()).needs_prior_policy
    assert not is_needed(phase(loss="reverse_kl", updates_per_round=2))
    assert not is_needed(phase(loss={"reverse_kl": 1.0, "outcome": 1.0}, correction="mask"))
    assert not is_needed(phase(loss="sampled_reverse_kl"))
    assert is_needed(phase(loss="sampled_reverse_kl", updates_per_round=2))
    assert is_needed(phase(loss="outcome", correction="sequence_mask"))
    assert is_needed(phase(loss={"sampled_reverse_kl": {"discount": 0.5}}))
    assert is_needed(phase(loss={"sampled_reverse_kl": {"early_gain": 0.5}}))
    assert is_needed(phase(loss="reverse_kl", balance={"follow_gap": 1.0}))
