"""Build the objective of a phase."""

from __future__ import annotations

from mergeopd.loss import policy
from mergeopd.loss.objective import DistillationObjective, build_objective
from mergeopd.loss.support import Support
from mergeopd.recipe import policy_terms as policies
from mergeopd.recipe.loss_terms import DIVERGENCE_TERMS, Loss
from mergeopd.recipe.training import Phase


def phase_objective(phase: Phase, updates_done: int, *, has_policy: bool) -> DistillationObjective:
    """Build the objective after `updates_done` updates of the phase, where weights may be ramps.

    `has_policy`: there are policy terms, including bridges that are one (`Plan.has_policy`).
    """
    loss = phase.loss
    divergences = {
        name: (loss.divergence(name), weight)
        for name in DIVERGENCE_TERMS
        if (weight := loss.weight(name, updates_done))
    }
    return build_objective(
        divergences,
        nll=loss.nll,
        temperature=loss.temperature,
        policy=_policy(phase, updates_done) if has_policy else None,
        support=support(loss),
    )


def support(loss: Loss) -> Support | None:
    """Convert `loss.support` to the kernel's type."""
    written = loss.support
    return None if written is None else Support(written.top_k, written.of, written.rest)


def correction(phase: Phase) -> policy.Correction:
    """Convert the correction of a phase's policy terms to the kernel's type."""
    written = phase.correction
    if isinstance(written, policies.Band):
        return policy.Correction(written.kind, written.low, written.high)
    return policy.Correction("none")


def _policy(phase: Phase, updates_done: int) -> policy.Policy:
    loss, clip = phase.loss, phase.clip_ratio
    sampled = loss.sampled_reverse_kl
    return policy.Policy(
        sampled=loss.weight("sampled_reverse_kl", updates_done),
        bound=None if sampled is None else sampled.bound,
        clip=None if clip is None else policy.ClipRatio(clip.low, clip.high, clip.dual),
        correction=correction(phase),
        anchor=_anchor(loss, updates_done),
    )


def _anchor(loss: Loss, updates_done: int) -> policy.TrustRegion | policy.Credit | None:
    match loss.outcome.teacher if loss.outcome is not None else None:
        case policies.TrustRegion(alpha=alpha):
            return policy.TrustRegion(alpha)
        case policies.Credit(mix=mix, bound=bound):
            return policy.Credit(policies.amount_at(mix, updates_done), bound)
        case _:
            return None
