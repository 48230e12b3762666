"""What must be known before the gradient: every weight and every global denominator.

Plain arithmetic over one update's answers. Nothing after this looks at the batch as a whole, so neither the
split into micro-batches nor their order can change the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mergeopd.loss.balance import follow_gap, token_share_weights


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
