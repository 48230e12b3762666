"""What the verifiers' rewards on a round mean: advantages, and whom teachers still comment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergeopd.loss.policy import Correction, bounded
from mergeopd.recipe.training import Phase
from mergeopd.types import Rollout


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Per rollout of a round.

    `advantage` is 0 for answers without an outcome: of other writers, cut off, without verifier, alone in
    their group. `teacher_loss_weight` multiplies the teachers' terms. `zero_advantage_fraction` is the share
    of the groups with an outcome whose responses all have one reward; None without groups.
    """

    advantage: tuple[float, ...]
    teacher_loss_weight: tuple[float, ...]
    zero_advantage_fraction: float | None


def outcomes(rollouts: Sequence[Rollout], rewards: Sequence[float | None], phase: Phase) -> Outcomes:
    """Advantages and teaching factors of a round; a group is the answers of the student to one prompt.

    A cut-off answer has no outcome and does not count in the others' advantages, but its reward does in the
    group's pass rate, and its teachers stay where the group has any. What nothing verifies, or another hand
    wrote, is taught in full.
    """
    groups: dict[str, list[int]] = {}
    for index, rollout in enumerate(rollouts):
        if rollout.origin == "student" and rewards[index] is not None:
            groups.setdefault(rollout.prompt.key, []).append(index)
    advantage = [0.0] * len(rollouts)
    teaching = [1.0] * len(rollouts)
    num_groups = num_silent = 0
    for members in groups.values():
        known = {i: _known(rewards[i]) for i in members}
        for index, factor in _teacher_loss_weights(rollouts, known, phase).items():
            teaching[index] = factor
        term = phase.loss.outcome
        whole = [i for i in members if rollouts[i].finish != "length"]
        if term is None or len(whole) < 2:
            continue
        values = group_advantages([known[i] for i in whole], term.std)
        num_groups, num_silent = num_groups + 1, num_silent + (not any(values))
        for index, value in zip(whole, values, strict=True):
            if term.answers == "all" or known[index] >= RIGHT:
                advantage[index] = value
    silent = num_silent / num_groups if num_groups else None
    return Outcomes(tuple(advantage), tuple(teaching), silent)


def _teacher_loss_weights(
    rollouts: Sequence[Rollout], rewards: dict[int, float], phase: Phase
) -> dict[int, float]:
    """What multiplies the teachers' terms of one group's answers."""
    balance = phase.balance
    rate = sum(rewards.values()) / len(rewards)
    exponents = balance.pass_rate
    factor = 1.0 if exponents is None else pass_rate_weight(rate, exponents.a, exponents.b)
    # A truncated response is not correct, whatever its reward.
    right = {i for i, reward in rewards.items() if reward >= RIGHT and rollouts[i].finish != "length"}
    taught = {}
    for index in rewards:
        match balance.distill_on:
            case "all":
                is_taught = True
            case "wrong":
                is_taught = index not in right
            case "failed_groups":
                is_taught = not right
        taught[index] = factor if is_taught else 0.0
    return taught


def _known(grade: float | None) -> float:
    assert grade is not None
    return grade


def sequence_kept(log_rho: Tensor, correction: Correction) -> bool:
    """Whether an answer's geometric mean ratio lies inside the correction's band; `log_rho` of its tokens."""
    if correction.kind != "sequence_mask" or not log_rho.numel():
        return True
    mean = float(torch.exp(log_rho.mean()))
    return correction.low <= mean <= correction.high


def reward_to_go(
    gap: Tensor, discount: float, *, future_only: bool = False, per_token: bool = False
) -> Tensor:
    """`A_t = sum over u >= t of discount^(u - t) gap_u` of one answer `[n]` (MiniLLM, 2306.08543).

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
    """`1 + gain (1 - C_t / C)`, C_t the sum of |gap| before t, C that of the answer (IW-OPD, 2606.22600)."""
    size = gap.abs()
    total = size.sum()
    before = size.cumsum(0) - size
    return 1.0 + gain * (1.0 - torch.where(total > 0, before / total.clamp(min=1e-30), 0.0))


def answers_advantage(
    gaps: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    bound: float | None,
    discount: float,
    future_only: bool,
    per_token: bool,
    gain: float,
) -> Tensor:
    """The teachers' advantage of one answer's tokens where it depends on all of them, `[n]`.

    `gaps` (log p_T - log p_S) and `weights` are one row per teacher; weights carry denominators. A token that
    a teacher does not judge (weight 0) adds nothing to what comes before it.
    """
    total = torch.zeros_like(gaps[0])
    for gap, weight in zip(gaps, weights, strict=True):
        judged = torch.where(weight > 0, bounded(gap, bound), 0.0)
        # The weight is one number per answer but for masked tokens, so that of any judged token serves all.
        scale = weight.max() if len(weight) else weight.sum()
        if discount:
            credited = reward_to_go(judged, discount, future_only=future_only, per_token=per_token)
        else:
            credited = early_weights(judged, gain) * judged
        total = total + scale * credited
    return total


RIGHT = 0.5
"""Rewards from here on count as right where an answer must be one or the other."""


_EPSILON = 1e-6


def group_advantages(rewards: Sequence[float], std: Literal["unbiased", "biased", "none"]) -> list[float]:
    """Rewards relative to their group (GRPO, 2402.03300): less the mean, over the standard deviation + 1e-6.

    `std`: with n - 1 (`unbiased`), with n (`biased`), or not divided at all (`none`; Dr. GRPO, 2503.20783).
    A group of one answer, or of equal rewards, has advantage 0.
    """
    num = len(rewards)
    if num < 2:
        return [0.0] * num
    mean = math.fsum(rewards) / num
    centred = [reward - mean for reward in rewards]
    if max(rewards) == min(rewards):
        return [0.0] * num
    if std == "none":
        return centred
    variance = math.fsum(value * value for value in centred) / (num - 1 if std == "unbiased" else num)
    return [value / (math.sqrt(variance) + _EPSILON) for value in centred]


def pass_rate_weight(pass_rate: float, a: float, b: float) -> float:
    """`p^a (1 - p)^b` (PACED, 2603.11178): most for prompts that are sometimes solved; 1 with a = b = 0."""
    return float(pass_rate**a * (1.0 - pass_rate) ** b)
