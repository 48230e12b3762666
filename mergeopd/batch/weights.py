"""Compute token weights with their global denominators, before the gradient.

Nothing after this depends on the batch as a whole, so neither the split into micro-batches nor their order
changes the gradient.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class ResponseSize:
    """A rollout's domain, its number of trained tokens, and `gap`, the divergence summed over them."""

    domain: str
    num_tokens: int
    gap: float = 0.0


def response_weights(
    responses: Sequence[ResponseSize],
    reduce: Literal["token", "sequence"],
    targets: Mapping[str, float] | Literal["equal", "off"],
    gap_exponent: float = 0.0,
) -> tuple[list[float], dict[str, float]]:
    """Return the weight of every token of each response, and the balance factor of each domain.

    `reduce="token"`: 1 / (tokens of the update). `reduce="sequence"`: 1 / (responses x tokens of the
    response); empty responses count in neither. Both are multiplied by the domain's balance factor, which
    changes no denominator: its target share (M1), times a power of the remaining gap (M2, `gap_exponent`).
    """
    num_tokens = sum(response.num_tokens for response in responses)
    num_sequences = sum(response.num_tokens > 0 for response in responses)
    if num_tokens == 0:
        return [0.0] * len(responses), {}
    if reduce == "token":
        weights = [1.0 / num_tokens for _ in responses]
    else:
        weights = [1.0 / (num_sequences * a.num_tokens) if a.num_tokens else 0.0 for a in responses]
    mass, gaps, tokens = defaultdict[str, float](float), defaultdict[str, float](float), Counter[str]()
    for response, weight in zip(responses, weights, strict=True):
        mass[response.domain] += weight * response.num_tokens
        gaps[response.domain] += response.gap
        tokens[response.domain] += response.num_tokens
    if targets == "off":
        factors = {domain: 1.0 for domain, value in mass.items() if value > 0}
    else:
        factors = token_share_weights(mass, None if targets == "equal" else targets)
    if gap_exponent:
        means = {domain: gaps[domain] / tokens[domain] for domain in factors}
        factors = follow_gap(factors, mass, means, gap_exponent)
    return [
        weight * factors.get(a.domain, 0.0) for a, weight in zip(responses, weights, strict=True)
    ], factors


def token_share_weights(mass: Mapping[str, float], targets: Mapping[str, float] | None) -> dict[str, float]:
    """Return factors that give every domain its target share of the loss (Open-MOPD M1, 2608.19098).

    `mass` is each domain's share of the loss before balancing: its token count for a token mean. `targets`
    are relative; None means equal. Shares are taken over the domains that are present (mass > 0); absent
    ones get no factor. The mass-weighted mean of the factors is 1, so the learning rate keeps its meaning. If
    all present domains have target 0, all factors are 0. Raises ValueError for a present domain without a
    target.
    """
    present = {domain: value for domain, value in mass.items() if value > 0}
    if not present:
        return {}
    wanted = dict.fromkeys(present, 1.0) if targets is None else dict(targets)
    missing = sorted(present.keys() - wanted.keys())
    if missing:
        raise ValueError(f"no target share for {', '.join(missing)}")
    total_mass = sum(present.values())
    total_target = sum(wanted[domain] for domain in present)
    if total_target <= 0:  # a small round may have drawn no other domain
        return dict.fromkeys(present, 0.0)
    return {
        domain: (wanted[domain] / total_target) / (value / total_mass) for domain, value in present.items()
    }


def follow_gap(
    weights: Mapping[str, float], mass: Mapping[str, float], gaps: Mapping[str, float], alpha: float
) -> dict[str, float]:
    """Scale the domains' factors by the remaining divergence (Open-MOPD M2, multiplicative; 2608.19098).

    `weights` are the domains' factors so far (M1's, or 1), `mass` their shares of the loss without them, and
    `gaps` their mean divergences. Each factor is multiplied by `clip((gap / reference)^alpha, 0.05, 20)`,
    where the reference is the mean gap under `weights`; then all are scaled so that their mass-weighted mean
    is 1. With alpha 0, or without any gap, returns `weights`. Gaps below 0, from rounding, count as 0.
    """
    gaps = {domain: max(gap, 0.0) for domain, gap in gaps.items()}
    total = sum(weights.values())
    reference = sum(weights[domain] * gaps[domain] for domain in weights) / total if total > 0 else 0.0
    if not alpha or reference <= 0:
        return dict(weights)
    scaled = {
        domain: weight * min(max((gaps[domain] / reference) ** alpha, 0.05), 20.0)
        for domain, weight in weights.items()
    }
    present = sum(mass[domain] for domain in scaled)
    norm = present / sum(weight * mass[domain] for domain, weight in scaled.items())
    return {domain: weight * norm for domain, weight in scaled.items()}
