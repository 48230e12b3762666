"""The progress of a run: a few integers that determine its state."""

from __future__ import annotations

from dataclasses import dataclass

from mergeopd.data.draw import PhasedDraw
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.training import Phase, off_policy_origin, on_policy_fraction
from mergeopd.rollout.keyed import stream_key, uniforms
from mergeopd.types import Origin, Prompt


@dataclass(frozen=True, slots=True)
class Progress:
    """`update` optimizer updates and `round` rounds are done, `drawn` prompts were consumed."""

    update: int = 0
    round: int = 0
    drawn: int = 0


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt of a round: how often it was drawn before, and the origin of its responses."""

    prompt: Prompt
    occurrence: int
    origin: Origin


def phase_at(plan: Plan, update: int) -> tuple[Phase, int] | None:
    """Return the phase of update number `update` (from 0) and its number of updates done; None at the end."""
    start = 0
    for phase in plan.phases:
        if update < start + phase.updates:
            return phase, update - start
        start += phase.updates
    return None


def draw_tasks(
    draw: PhasedDraw, plan: Plan, phase: Phase, progress: Progress, updates_done: int
) -> list[Task]:
    """Draw the next round's prompts and the origin of responses, as a function of plan and cursor only.

    The prompts have the teachers of the phase.
    """
    teachers = plan.teachers_of(phase)
    drawn = draw.draw(phase.name, phase.num_drawn(updates_done), phase.prompts_per_round)
    fraction = on_policy_fraction(phase, updates_done)
    other = off_policy_origin(phase)
    keys = [stream_key(plan.seed, "who answers", progress.drawn + i) for i in range(len(drawn))]
    chances = uniforms(keys, 1)[:, 0]
    return [
        Task(teachers.route(prompt), occurrence, "student" if other is None or chance < fraction else other)
        for (occurrence, prompt), chance in zip(drawn, chances.tolist(), strict=True)
    ]
