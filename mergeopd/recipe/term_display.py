"""How the measured value of a loss term or of a bridge is shown. The rows stand beside the schema: `TERMS` in
`loss_terms.py`, `BRIDGES` in `bridges.py`.
"""

from __future__ import annotations

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
