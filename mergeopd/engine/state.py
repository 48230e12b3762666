"""Where a run stands: the few integers from which everything else follows."""

from __future__ import annotations

from dataclasses import dataclass

from mergeopd.recipe.plan import Plan
from mergeopd.recipe.training import Phase, Ramp, TextMixture
from mergeopd.types import Origin


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


def on_policy_fraction(phase: Phase, updates_done: int) -> float:
    """Share of prompts that the student answers after `updates_done` updates of the phase."""
    if not isinstance(phase.text, TextMixture):
        return 1.0 if phase.text == "student" else 0.0
    fraction = phase.text.on_policy_fraction
    if isinstance(fraction, Ramp):
        progress = min(updates_done / fraction.updates, 1.0)
        return fraction.start + (fraction.end - fraction.start) * progress
    return fraction


def off_policy_origin(phase: Phase) -> Origin | None:
    """Where the answers come from that the student does not write: teacher, dataset, or None."""
    if isinstance(phase.text, TextMixture):
        return phase.text.otherwise
    return None if phase.text == "student" else phase.text
