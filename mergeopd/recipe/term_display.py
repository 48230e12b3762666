"""Titles, units and colour scales of the loss terms and of the bridges: one row each.

Metrics, terminal, report page and TensorBoard use this table. The kernels of the divergences are in
`batch/objective.py`, under the same keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TermDisplay:
    """Display settings of a loss term.

    `column` is the short form of `title` for tables. A token has 63 % of the full colour at the value
    `colour_scale`, which is below 1 for bounded terms.
    """

    title: str
    column: str
    subtitle: str
    unit: str = "nats per token"
    colour_scale: float = 1.0


TERMS: Mapping[str, TermDisplay] = {
    "reverse_kl": TermDisplay("Reverse KL", "reverse KL", "KL(student ‖ teacher)"),
    "forward_kl": TermDisplay("Forward KL", "forward KL", "KL(teacher ‖ student)"),
    "tvd": TermDisplay("TVD", "TVD", "total variation distance", "mean per token", colour_scale=0.3),
    "jsd": TermDisplay("JSD", "JSD", "generalised Jensen-Shannon divergence", colour_scale=0.2),
    "skew_forward_kl": TermDisplay("Skew forward KL", "skew fwd KL", "KL(teacher ‖ mixture)"),
    "skew_reverse_kl": TermDisplay("Skew reverse KL", "skew rev KL", "KL(student ‖ mixture)"),
    "alpha_divergence": TermDisplay(
        "Alpha divergence", "alpha div", "between reverse KL and forward KL", "mean per token"
    ),
    "clipped_forward_kl": TermDisplay(
        "Clipped forward KL", "clipped KL", "forward KL with capped entries", colour_scale=0.1
    ),
    "sampled_reverse_kl": TermDisplay(
        "Reverse KL, sampled", "sampled KL", "k3 estimate from the sampled tokens"
    ),
    "outcome": TermDisplay("Reward", "reward", "mean over the responses that a verifier checked", ""),
    "nll": TermDisplay("NLL of the text", "NLL", "-log p of the student, for text of any origin"),
}

BRIDGES: Mapping[str, TermDisplay] = {
    "pieces": TermDisplay("KL of pieces", "pieces", "or JSD, in the student's vocabulary", "nats per group"),
    "gold": TermDisplay("GOLD", "GOLD", "JSD of shared tokens, the others by rank", "mean per group"),
    "uld": TermDisplay("ULD", "ULD", "probabilities by rank", "mean per group"),
    "projection": TermDisplay(
        "Projected KL", "projected KL", "in the teacher's vocabulary", "nats per group"
    ),
    "span": TermDisplay("Span log-ratio", "span", "student minus teacher, by group", "nats per group"),
}

MEASURES: Mapping[str, TermDisplay] = {
    **{key: row for key, row in TERMS.items() if key not in ("outcome", "nll")},
    **BRIDGES,
}
"""The measures of a teacher's tokens or groups."""
