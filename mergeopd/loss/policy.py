"""Policy terms as (ratio, advantage) pairs under one clipped surrogate; docs/objectives.md names the methods.

Pure functions on per-token tensors. Advantages arrive with every weight and denominator inside, which the
surrogate allows because it is homogeneous in them: `min(r c A, clip(r) c A) = c min(r A, clip(r) A)`, c >= 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# exp(20) is far outside every sensible bound, and finite in all precisions.
_LOG_BOUND = 20.0


@dataclass(frozen=True, slots=True)
class ClipRatio:
    """`clip(r, 1 - low, 1 + high)`; with `dual`, r counts up to `dual` where the advantage is negative."""

    low: float
    high: float
    dual: float | None = None


@dataclass(frozen=True, slots=True)
class Correction:
    """Importance weight of a token, from `rho = pi_old / behaviour` and bounds; see `importance_weight`."""

    kind: Literal["none", "truncate", "mask", "sequence_mask"]
    low: float = 0.0
    high: float = torch.inf


@dataclass(frozen=True, slots=True)
class TrustRegion:
    """Ratio `pi / (pi_old^alpha pi_T^(1 - alpha))` (RLAD, 2602.22495); alpha 1 is pi / pi_old."""

    alpha: float


@dataclass(frozen=True, slots=True)
class Credit:
    """Advantage times `(1 - mix) + mix clip(e^(sign(A) d), 1 - bound, 1 + bound)` (RLSD, 2604.03128)."""

    mix: float
    bound: float


@dataclass(frozen=True, slots=True)
class Policy:
    """The policy part of an objective; `sampled` weighs the teachers' log-ratios, clamped to +-`bound`."""

    sampled: float = 0.0
    bound: float | None = None
    clip: ClipRatio | None = None
    correction: Correction = Correction("none")
    anchor: TrustRegion | Credit | None = None


@dataclass(frozen=True, slots=True)
class PolicyRows:
    """Constant inputs of the policy terms for N tokens.

    own_N        1 for tokens that the student generated, else 0: those have no policy term
    outcome_N    outcome advantage with all weights
    behaviour_N  log-probability under the policy that generated the token
    keep_N       0 where a correction drops the whole response, else 1
    old_N        log-probability before the round's first update; None: this is the round's first update
    teacher_N    teachers' advantage with all weights where it depends on whole responses; None: on the token
    span_N       advantage, with all weights, from teachers with another tokenizer; None: there are none
    sampled_KN   the teachers' weights in the sampled reverse KL; None: those of all terms
    """

    own_N: Tensor
    outcome_N: Tensor
    behaviour_N: Tensor
    keep_N: Tensor
    old_N: Tensor | None = None
    teacher_N: Tensor | None = None
    span_N: Tensor | None = None
    sampled_KN: Tensor | None = None


@dataclass(frozen=True, slots=True)
class PolicyTokens:
    """A policy term by token, `[n]`: the loss, its ratio and weight, and where each of them is bounded."""

    loss: Tensor
    log_ratio_old: Tensor  # log pi_old - log behaviour
    weight: Tensor
    is_corrected: Tensor  # the importance weight is not the ratio
    is_clipped: Tensor  # no gradient because of the clip


def policy_tokens(
    policy: Policy,
    rows: PolicyRows,
    slice_: slice,
    logprob_S: Tensor,
    logprob_T: Tensor,
    teacher_weight: Tensor,
) -> PolicyTokens:
    """Compute the surrogate of the tokens `slice_` of `rows`; differentiable in `logprob_S` `[n]` alone.

    `logprob_T` and `teacher_weight` are `[K, n]`; a teacher's weight is 0 where it has no loss.
    """
    current = logprob_S.detach()
    own, outcome = rows.own_N[slice_], rows.outcome_N[slice_]
    old = current if rows.old_N is None else rows.old_N[slice_]
    advantage, log_ratio = outcome, logprob_S - old
    if isinstance(policy.anchor, TrustRegion):
        gap = _mean_gap(logprob_T, old, teacher_weight)
        log_ratio = log_ratio - (1.0 - policy.anchor.alpha) * gap
    elif isinstance(policy.anchor, Credit):
        advantage = shaped(outcome, _mean_gap(logprob_T, current, teacher_weight), policy.anchor)
    if rows.teacher_N is not None:
        advantage = advantage + rows.teacher_N[slice_]
    elif policy.sampled:
        gap = bounded(logprob_T - current, policy.bound)
        weight_T = teacher_weight if rows.sampled_KN is None else rows.sampled_KN[:, slice_]
        advantage = advantage + policy.sampled * own * (weight_T * gap).sum(0)
    if rows.span_N is not None:
        advantage = advantage + rows.span_N[slice_]
    log_rho = torch.where(own > 0, old - rows.behaviour_N[slice_], 0.0)
    weight, is_corrected = importance_weight(log_rho, policy.correction)
    keep = rows.keep_N[slice_]
    ratio = torch.exp(log_ratio.clamp(-_LOG_BOUND, _LOG_BOUND))
    value, is_clipped = clipped(ratio, advantage, policy.clip)
    return PolicyTokens(
        loss=-(weight * keep) * value,
        log_ratio_old=log_rho,
        weight=weight * keep,
        is_corrected=(is_corrected | (keep == 0)) & (own > 0),
        is_clipped=is_clipped & (own > 0),
    )


def clipped(ratio: Tensor, advantage: Tensor, clip: ClipRatio | None) -> tuple[Tensor, Tensor]:
    """Return `min(r A, clip(r) A)` with the dual bound for A < 0, to be maximised, where it is constant."""
    plain = ratio * advantage
    if clip is None:
        return plain, torch.zeros_like(plain, dtype=torch.bool)
    pushed = ratio.clamp(1.0 - clip.low, 1.0 + clip.high) * advantage
    is_clipped = pushed < plain
    value = torch.where(is_clipped, pushed, plain)
    if clip.dual is not None:
        floor = clip.dual * advantage
        is_floored = (advantage < 0) & (value < floor)
        value, is_clipped = torch.where(is_floored, floor, value), is_clipped | is_floored
    return value, is_clipped


def importance_weight(log_rho: Tensor, correction: Correction) -> tuple[Tensor, Tensor]:
    """Return a constant weight per token from `log rho = log pi_old - log behaviour`, and where it differs.

    none: 1. truncate: rho clamped to [low, high]. mask: rho inside [low, high], bounds included, 0 outside
    (IcePop, GLM-5 2602.15763). sequence_mask: rho; whole responses are dropped by `sequence_kept`.
    """
    rho = torch.exp(log_rho.clamp(-_LOG_BOUND, _LOG_BOUND))
    if correction.kind in ("none", "sequence_mask"):
        weight = torch.ones_like(rho) if correction.kind == "none" else rho
        return weight, torch.zeros_like(rho, dtype=torch.bool)
    outside = (rho < correction.low) | (rho > correction.high)
    if correction.kind == "mask":
        return torch.where(outside, 0.0, rho), outside
    return rho.clamp(correction.low, correction.high), outside


def bounded(gap: Tensor, bound: float | None) -> Tensor:
    """Clamp log-ratios to +-`bound` (MOPD, 2606.30406)."""
    return gap if bound is None else gap.clamp(-bound, bound)


def shaped(advantage: Tensor, gap: Tensor, credit: Credit) -> Tensor:
    """Scale the advantage per token by `gap` = log p_T - log p_S, without changing its sign (RLSD)."""
    weight = torch.exp((advantage.sign() * gap).clamp(-_LOG_BOUND, _LOG_BOUND))
    share = weight.clamp(1.0 - credit.bound, 1.0 + credit.bound)
    return advantage * ((1.0 - credit.mix) + credit.mix * share)


def _mean_gap(logprob_T: Tensor, logprob: Tensor, weight: Tensor) -> Tensor:
    """`log p_T - logprob` of the teachers' weighted geometric mean; 0 where all weights are 0."""
    total = weight.sum(0)
    share = weight / torch.where(total > 0, total, 1.0)
    return (share * (logprob_T - logprob)).sum(0)
