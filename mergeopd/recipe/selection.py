"""Selection of a phase's prompts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mergeopd.config.values import Fraction, Positive, PositiveInt, Strict


class Frontier(Strict):
    """Prompts that the student solves sometimes, but not always, with its weights at the phase's start."""

    low: Fraction = 0.1
    """least pass rate: mean reward of the student's responses"""
    high: Fraction = 0.9
    """largest pass rate"""
    samples: Annotated[int, Field(ge=2, strict=True)] = 4
    """responses to each prompt"""

    @model_validator(mode="after")
    def _ordered(self) -> Frontier:
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}: exchange them")
        return self


class TeacherRight(Strict):
    """Prompts that their teacher solves."""

    least: Annotated[float, Field(gt=0.0, le=1.0, strict=True)] = 0.5
    """least pass rate: mean reward of the responses of the teacher that generates text for the prompt"""
    samples: PositiveInt = 1
    """responses to each prompt"""


class NearTeacher(Strict):
    """Prompts on which the student is near its teachers, with its weights at the phase's start."""

    nats: Positive = 1.0
    """largest mean of log p of student minus teacher, per token of the student's responses: an estimate of
    the reverse KL"""
    samples: PositiveInt = 1
    """responses to each prompt; those of `frontier` are used again"""


class Select(Strict):
    """Prompts of a phase that it draws from; all others are left out. Applied in this order."""

    deduplicate: Literal["exact"] | Annotated[float, Field(ge=0.5, lt=1.0, strict=True)] | None = None
    """leave out prompts that equal an earlier one of the phase but for case and space (`exact`), or whose
    sets of 5 characters have at least this Jaccard similarity with those of an earlier one"""
    teacher_right: TeacherRight | None = None
    """keep prompts that their teacher solves"""
    frontier: Frontier | None = None
    """keep prompts that the student solves sometimes, but not always"""
    near_teacher: NearTeacher | None = None
    """keep prompts on which the student is near its teachers"""

    @model_validator(mode="after")
    def _not_empty(self) -> Select:
        if not self.rules:
            raise ValueError(f"nothing selects: name one of {', '.join(Select.model_fields)}")
        return self

    @property
    def rules(self) -> tuple[str, ...]:
        """Names of the rules that are used."""
        return tuple(name for name in Select.model_fields if getattr(self, name) is not None)

    @property
    def teacher_rules(self) -> tuple[str, ...]:
        """Names of the rules that need teachers of the prompts."""
        return tuple(rule for rule in self.rules if rule in ("teacher_right", "near_teacher"))

    @property
    def is_measured(self) -> bool:
        """Whether the selection depends on the student's weights."""
        return self.frontier is not None or self.near_teacher is not None

    @property
    def num_student_samples(self) -> int:
        """Responses of the student to each prompt; 0 if none are needed."""
        own = (self.frontier, self.near_teacher)
        return max((rule.samples for rule in own if rule is not None), default=0)
