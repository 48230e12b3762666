"""Where a run stands: the few integers from which everything else follows."""

from __future__ import annotations

from dataclasses import dataclass

from mergeopd.recipe.plan import Plan
from mergeopd.recipe.training import Phase


@dataclass(frozen=True, slots=True)
class Progress:
    """`update` optimizer updates and `round` rounds are done, `drawn` prompts were consumed."""

    update: int = 0
    round: int = 0
    drawn: int = 0


def phase_at(plan: Plan, update: int) -> tuple[Phase, int] | None:
    """The phase that makes update number `update` (from 0) and how many updates it has behind it.

    None when the run is complete.
    """
    start = 0
    for phase in plan.phases:
        if update < start + phase.updates:
            return phase, update - start
        start += phase.updates
    return None
