"""The result of `check`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mergeopd.preflight.inputs import Inputs
from mergeopd.recipe.plan import Plan


@dataclass(frozen=True, slots=True)
class SourceSummary:
    """A file of training prompts: its teachers with their weights, and how often a prompt is drawn."""

    domain: str
    teachers: Mapping[str, float]
    num_prompts: int
    passes: float


@dataclass(frozen=True, slots=True)
class CheckResult:
    """A valid recipe. `notes` are remarks for the user; `sources` are the training prompts by source name."""

    plan: Plan
    notes: tuple[str, ...]
    sources: Mapping[str, SourceSummary]

    @classmethod
    def of(cls, inputs: Inputs, *more_notes: str | None) -> CheckResult:
        """Summarize the inputs of a check."""
        notes = (*inputs.notes, *(note for note in more_notes if note))
        plan = inputs.plan
        drawn = dict.fromkeys((source.name for source in plan.sources), 0.0)
        teachers: dict[str, dict[str, float]] = {name: {} for name in drawn}
        for phase in plan.phases:
            for name, routed in plan.teachers_of(phase).routed.items():
                teachers[name] = {**routed, **teachers[name]}
            shares = plan.shares(phase)
            for name, share in shares.items():
                drawn[name] += phase.num_prompts * share / sum(shares.values())
        sources = {}
        for source in plan.sources:
            num = len(inputs.prompts[source.name])
            sources[source.name] = SourceSummary(
                source.domain, teachers[source.name], num, drawn[source.name] / num
            )
        return cls(plan, notes, sources)

    @property
    def num_prompts(self) -> int:
        """The number of training prompts."""
        return sum(source.num_prompts for source in self.sources.values())

    def __str__(self) -> str:
        plan = self.plan
        return ", ".join(
            (
                _counted(len(plan.teachers), "teacher"),
                _counted(self.num_prompts, "prompt"),
                f"{_counted(plan.num_updates, 'update')} in {_counted(len(plan.phases), 'phase')}",
            )
        )


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
