"""Turn the rewards of a group of responses to one prompt into advantages and pass-rate weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

RIGHT = 0.5
"""The smallest reward that counts as correct."""

_EPSILON = 1e-6


def group_advantages(rewards: Sequence[float], std: Literal["unbiased", "biased", "none"]) -> list[float]:
    """Return advantages (GRPO, 2402.03300): reward minus group mean, over its standard deviation + 1e-6.

    `std` divides by n - 1 (`unbiased`) or n (`biased`); `none` does not divide (Dr. GRPO, 2503.20783). A
    group of one response, or of equal rewards, has advantage 0.
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
    """Return `p^a (1 - p)^b` (PACED, 2603.11178): largest for prompts that are sometimes solved."""
    return float(pass_rate**a * (1.0 - pass_rate) ** b)
