"""How the measured value of a loss term or of a bridge is shown. The rows stand beside the schema: `TERMS` in
`loss_terms.py`, `BRIDGES` in `bridges.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TermDisplay:
    """How the measured value of a loss term is shown.

    `column` is the short form of `title` for tables. A token reaches 63 % of the full colour at
    `colour_scale`, in the term's unit: smaller than 1 for values that are bounded.
    """

    title: str
    column: str
    subtitle: str
    unit: str = "nats per token"
    colour_scale: float = 1.0
