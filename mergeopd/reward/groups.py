"""From the rewards of a group of answers to one prompt: advantages and pass rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

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
