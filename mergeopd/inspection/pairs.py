"""A teacher beside the student: what both read, from a checked recipe."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mergeopd.data.renderer import Renderer
from mergeopd.models.facts import ModelFacts
from mergeopd.preflight.inputs import Inputs
from mergeopd.recipe.plan import Plan, TeacherPlan
from mergeopd.teacher.cross_tokenizer import CrossTokenizer
from mergeopd.types import Prompt


@dataclass(frozen=True)
class Pair:
    """A teacher and the student of checked inputs; `prompts` are those that the teacher reads."""

    inputs: Inputs
    plan: TeacherPlan
    student: Renderer
    teacher: Renderer
    prompts: tuple[Prompt, ...]

    @classmethod
    def of(cls, inputs: Inputs, name: str) -> Pair:
        """Find a teacher of the plan, and the prompts that it reads in some phase."""
        sources = sources_of(inputs.plan, name)
        prompts = tuple(p for source in sources for p in inputs.prompts[source] if p.document is None)
        return cls(inputs, inputs.plan.teachers[name], inputs.student, inputs.teachers[name], prompts)

    @property
    def cross_tokenizer(self) -> CrossTokenizer | None:
        """The bridge to the teacher's tokens, where they are not the student's."""
        return self.inputs.cross_tokenizers.get(self.plan.name)

    @cached_property
    def student_facts(self) -> ModelFacts:
        return ModelFacts.read(Path(self.inputs.plan.student.model))

    @cached_property
    def teacher_facts(self) -> ModelFacts:
        return ModelFacts.read(self.plan.folder, "any")


def sources_of(plan: Plan, teacher: str) -> tuple[str, ...]:
    """Return the names of the sources whose prompts a teacher reads in some phase, in the recipe's order."""
    names: set[str] = set()
    for phase in plan.phases:
        of_phase = plan.teachers_of(phase)
        names |= {source for source in of_phase.routed if teacher in of_phase.routed[source]}
        names |= {source for source in of_phase.routed if teacher in of_phase.scoring([source])}
    return tuple(source.name for source in plan.sources if source.name in names)
