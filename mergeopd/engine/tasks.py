"""The prompts of a round and who answers each: a function of seed and cursor alone."""

from __future__ import annotations

from dataclasses import dataclass

from mergeopd.engine.build import Parts
from mergeopd.engine.progress import Progress
from mergeopd.recipe import sources
from mergeopd.recipe.training import Phase, off_policy_origin, on_policy_fraction
from mergeopd.rollout.keyed import stream_key, uniforms
from mergeopd.types import Origin, Prompt


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt of a round: how often it came before, and who answers it this time."""

    prompt: Prompt
    occurrence: int
    origin: Origin


def plan_round(parts: Parts, phase: Phase, progress: Progress, updates_done: int) -> list[Task]:
    """The prompts of the next round and who answers each; a function of seed and cursor alone."""
    plan = parts.plan
    drawn = parts.prompt_draw.draw(progress.drawn, phase.prompts_per_round)
    fraction = on_policy_fraction(phase, updates_done)
    other = off_policy_origin(phase)
    keys = [stream_key(plan.seed, "who answers", progress.drawn + i) for i in range(len(drawn))]
    chances = uniforms(keys, 1)[:, 0]
    return [
        Task(prompt, occurrence, "student" if other is None or chance < fraction else other)
        for (occurrence, prompt), chance in zip(drawn, chances.tolist(), strict=True)
    ]


def author(prompt: Prompt) -> str:
    """The teacher that writes for a prompt."""
    return sources.author(prompt.teachers)
