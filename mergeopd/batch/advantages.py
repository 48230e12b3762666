"""Turn rewards into advantages, and decide which responses keep their distillation loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergeopd.loss.policy import Correction, bounded
from mergeopd.recipe.policy_terms import SampledTerm
from mergeopd.recipe.training import Phase
from mergeopd.types import Rollout


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Per rollout of a round.

    `advantage` is 0 for responses without an outcome: not the student's own, truncated, without a verifier,
    or alone in their group. `teacher_loss_weight` multiplies the teachers' terms.
    `zero_advantage_fraction` is the share of the groups with an outcome whose responses all have one reward;
    None without groups.
    """

    advantage: tuple[float, ...]
    teacher_loss_weight: tuple[float, ...]
    zero_advantage_fraction: float | None


def outcomes(rollouts: Sequence[Rollout], rewards: Sequence[float | None], phase: Phase) -> Outcomes:
    """Compute a round's advantages and distillation weights; a group has the student's responses to a prompt.

    A truncated response has no outcome and is left out of the others' advantages, but its reward counts in
    the group's pass rate. Responses without a verifier, and those that are not the student's own, keep their
    full distillation loss.
    """
    groups: dict[str, dict[int, float]] = {}
    for index, (rollout, reward) in enumerate(zip(rollouts, rewards, strict=True)):
        if rollout.origin == "student" and reward is not None:
            groups.setdefault(rollout.prompt.key, {})[index] = reward
    advantage = [0.0] * len(rollouts)
    teacher_loss_weight = [1.0] * len(rollouts)
    num_groups = num_equal = 0
    for known in groups.values():
        for index, factor in _teacher_loss_weights(rollouts, known, phase).items():
            teacher_loss_weight[index] = factor
        term = phase.loss.outcome
        whole = [i for i in known if rollouts[i].finish != "length"]
        if term is None or len(whole) < 2:
            continue
        values = group_advantages([known[i] for i in whole], term.std)
        num_groups, num_equal = num_groups + 1, num_equal + (not any(values))
        for index, value in zip(whole, values, strict=True):
            if term.answers == "all" or known[index] >= RIGHT:
                advantage[index] = value
    zero_advantage = num_equal / num_groups if num_groups else None
    return Outcomes(tuple(advantage), tuple(teacher_loss_weight), zero_advantage)


def _teacher_loss_weights(
    rollouts: Sequence[Rollout], rewards: dict[int, float], phase: Phase
) -> dict[int, float]:
    """Return the factor of the teachers' terms for each response of a group."""
    balance = phase.balance
    rate = sum(rewards.values()) / len(rewards)
    exponents = balance.pass_rate
    factor = 1.0 if exponents is None else pass_rate_weight(rate, exponents.a, exponents.b)
    # A truncated response is not correct, whatever its reward.
    right = {i for i, reward in rewards.items() if reward >= RIGHT and rollouts[i].finish != "length"}
    if balance.distill_on == "failed_groups" and right:
        return dict.fromkeys(rewards, 0.0)
    dropped = right if balance.distill_on == "wrong" else ()
    return {index: 0.0 if index in dropped else factor for index in rewards}


def sequence_kept(log_rho: Tensor, correction: Correction) -> bool:
    """Whether the geometric mean of a response's ratios, exp(`log_rho`), is in the correction's band."""
    if correction.kind != "sequence_mask" or not log_rho.numel():
        return True
    mean = float(torch.exp(log_rho.mean()))
    return correction.low <= mean <= correction.high


def reward_to_go(
    gap: Tensor, discount: float, *, future_only: bool = False, per_token: bool = False
) -> Tensor:
    """`A_t = sum over u >= t of discount^(u - t) gap_u` of one response `[n]` (MiniLLM, 2306.08543).

    `future_only` leaves out u = t; `per_token` divides by the number of tokens summed over.
    """
    sums, later = [], 0.0
    for value in reversed(gap.tolist()):  # plain numbers: thousands of tiny tensor operations take seconds
        later = value + discount * later
        sums.append(later)
    total = gap.new_tensor(sums[::-1])
    if future_only:
        total = total - gap
    if per_token:
        remaining = torch.arange(len(gap), 0, -1, dtype=gap.dtype, device=gap.device) - float(future_only)
        total = total / remaining.clamp(min=1.0)
    return total


def early_weights(gap: Tensor, gain: float) -> Tensor:
    """`1 + gain (1 - C_t / C)`, C_t the sum of |gap| before t, C over the response (IW-OPD, 2606.22600)."""
    size = gap.abs()
    total = size.sum()
    before = size.cumsum(0) - size
    return 1.0 + gain * (1.0 - torch.where(total > 0, before / total.clamp(min=1e-30), 0.0))


def sequence_advantage(gaps: Sequence[Tensor], weights: Sequence[Tensor], term: SampledTerm) -> Tensor:
    """Compute the teachers' advantages `[n]` of one response where each depends on all of its tokens.

    `gaps` (log p_T - log p_S) and `weights` have one row per teacher; weights contain all denominators. A
    token of weight 0 adds nothing to the advantages of the tokens before it.
    """
    total = torch.zeros_like(gaps[0])
    for gap, weight in zip(gaps, weights, strict=True):
        counted = torch.where(weight > 0, bounded(gap, term.bound), 0.0)
        # A response has one weight, except 0 for masked tokens.
        scale = weight.max() if len(weight) else weight.sum()
        if term.discount:
            options = {"future_only": term.future_only, "per_token": term.per_remaining_token}
            credited = reward_to_go(counted, term.discount, **options)
        else:
            credited = early_weights(counted, term.early_gain) * counted
        total = total + scale * credited
    return total


RIGHT = 0.5
"""Smallest reward of a response that counts as correct."""


_EPSILON = 1e-6


def group_advantages(rewards: Sequence[float], std: Literal["unbiased", "biased", "none"]) -> list[float]:
    """Return (reward - mean) / (standard deviation + 1e-6) over a group (GRPO, 2402.03300).

    `std`: with n - 1 (`unbiased`), with n (`biased`), or no division (`none`; Dr. GRPO, 2503.20783). A group
    of one response, or of equal rewards, has advantage 0.
    """
    num = len(rewards)
    if num < 2 or max(rewards) == min(rewards):
        return [0.0] * num
    mean = math.fsum(rewards) / num
    centred = [reward - mean for reward in rewards]
    if std == "none":
        return centred
    variance = math.fsum(value * value for value in centred) / (num - 1 if std == "unbiased" else num)
    return [value / (math.sqrt(variance) + _EPSILON) for value in centred]


def pass_rate_weight(pass_rate: float, a: float, b: float) -> float:
    """Return `p^a (1 - p)^b` (PACED, 2603.11178): largest for prompts solved sometimes; 1 with a = b = 0."""
    return float(pass_rate**a * (1.0 - pass_rate) ** b)
