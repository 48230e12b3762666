"""What must be known before the gradient: every weight and every global denominator.

Plain arithmetic over one update's answers. Nothing after this looks at the batch as a whole, so neither the
split into micro-batches nor their order can change the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Answer:
    """What the arithmetic needs to know of a rollout.

    `gap` is how far its teachers are from the student, summed over its tokens.
    """

    domain: str
    num_tokens: int
    gap: float = 0.0


def answer_weights(
    answers: Sequence[Answer],
    reduce: Literal["token", "sequence"],
    targets: Mapping[str, float] | Literal["equal", "off"],
    gap_exponent: float = 0.0,
) -> tuple[list[float], dict[str, float]]:
    """Weight of every token of each answer, and the balance factor of each domain.

    `reduce="token"`: 1 / (tokens of the update). `reduce="sequence"`: 1 / (answers x tokens of the answer);
    empty answers count in neither. Both are multiplied by the domain's balance factor, which changes no
    denominator: its target share (M1), times what follows the gap that is left (M2, `gap_exponent`).
    """
    num_tokens = sum(answer.num_tokens for answer in answers)
    num_sequences = sum(answer.num_tokens > 0 for answer in answers)
    if num_tokens == 0:
        return [0.0] * len(answers), {}
    if reduce == "token":
        weights = [1.0 / num_tokens for _ in answers]
    else:
        weights = [1.0 / (num_sequences * a.num_tokens) if a.num_tokens else 0.0 for a in answers]
    mass: dict[str, float] = {}
    gaps: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for answer, weight in zip(answers, weights, strict=True):
        mass[answer.domain] = mass.get(answer.domain, 0.0) + weight * answer.num_tokens
        gaps[answer.domain] = gaps.get(answer.domain, 0.0) + answer.gap
        tokens[answer.domain] = tokens.get(answer.domain, 0) + answer.num_tokens
    if targets == "off":
        factors = {domain: 1.0 for domain, value in mass.items() if value > 0}
    else:
        factors = token_share_weights(mass, None if targets == "equal" else targets)
    if gap_exponent:
        means = {domain: gaps[domain] / tokens[domain] for domain in factors}
        factors = follow_gap(factors, mass, means, gap_exponent)
    return [weight * factors.get(a.domain, 0.0) for a, weight in zip(answers, weights, strict=True)], factors


def token_share_weights(mass: Mapping[str, float], targets: Mapping[str, float] | None) -> dict[str, float]:
    """Per-domain factors that give every domain its target share of the loss (Open-MOPD M1, 2608.19098).

    `mass` is each domain's share of the loss before balancing: its token count for a token mean. `targets`
    are relative; None means equal. Shares are taken over the domains that are present (mass > 0); absent
    ones get no factor. The mass-weighted mean of the factors is 1, so the learning rate keeps its meaning;
    where all that are present have target 0, so has every factor. Raises ValueError for a present domain
    without a target.
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
    if total_target <= 0:  # a small round may have drawn no other domain: it teaches nothing
        return dict.fromkeys(present, 0.0)
    return {
        domain: (wanted[domain] / total_target) / (value / total_mass) for domain, value in present.items()
    }


def follow_gap(
    weights: Mapping[str, float], mass: Mapping[str, float], gaps: Mapping[str, float], alpha: float
) -> dict[str, float]:
    """Per-domain factors that follow the teachers' remaining gap (Open-MOPD M2, multiplying; 2608.19098).

    `weights` are the domains' factors so far (M1's, or 1), `mass` their shares of the loss before them,
    `gaps` how far student and teacher are apart on average. Each factor is multiplied by
    `clip((gap / reference)^alpha, 0.05, 20)`, the reference being the gaps' mean under `weights`; then all
    are scaled so that their mass-weighted mean is 1. With alpha 0, or without any gap, `weights` come back. A
    gap below 0, which rounding leaves of a divergence where both models agree, is none.
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
