"""Routing: which teachers score the responses of a phase, with which weights, and which of them generate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from mergeopd.config.values import Name, Weight
from mergeopd.types import Prompt

if TYPE_CHECKING:
    from mergeopd.recipe.training import Phase

TeacherWeights = Mapping[str, float]


def teachers_shorthand(value: Any) -> Any:
    """Expand a teacher, or a list of them, to weights of 1."""
    if isinstance(value, str):
        return {value: 1.0}
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        if twice := [name for name in value if value.count(name) > 1]:
            raise ValueError(f"teacher '{twice[0]}' is named twice: name it once, or give weights")
        return dict.fromkeys(value, 1.0)
    return value


_Weights = Annotated[dict[Name, Weight], Field(min_length=1)]

Routing = Annotated[
    _Weights,
    BeforeValidator(
        teachers_shorthand,
        json_schema_input_type=Name | Annotated[list[Name], Field(min_length=1)] | _Weights,
    ),
]


@dataclass(frozen=True, slots=True)
class PhaseTeachers:
    """The teachers of a phase; all weights are positive and contain the teachers' own.

    `routed` are those of each source, by its name: they score for every term without teachers of its own, and
    the heaviest generates. `of_terms` are the terms with teachers of their own. `scores_routed` is False
    where every term has its own, so that routed teachers only generate.
    """

    routed: Mapping[str, TeacherWeights]
    of_terms: Mapping[str, TeacherWeights]
    scores_routed: bool

    @classmethod
    def of(cls, phase: Phase, sources: Mapping[str, TeacherWeights], own: TeacherWeights) -> PhaseTeachers:
        """Resolve the teachers of a phase.

        `sources` are the teachers that the phase's sources are routed to, with weights, by source; `own` has
        the weight of every teacher. A teacher in `phase.teachers` keeps to the sources that are routed to it,
        with the product of both weights. One that none of the sources is routed to teaches all their prompts.
        """
        routed = sources
        if phase.teachers is not None:
            named = {name: weight for name, weight in phase.teachers.items() if name in own}
            elsewhere = {
                name: weight * own[name]
                for name, weight in named.items()
                if not any(name in teachers for teachers in sources.values())
            }
            routed = {
                source: {n: weights[n] * weight for n, weight in named.items() if n in weights} | elsewhere
                for source, weights in sources.items()
            }
        of_terms = {
            term: _positive({name: weight * own[name] for name, weight in teachers.items() if name in own})
            for term, teachers in phase.loss.term_teachers.items()
        }
        routed = {source: _positive(weights) for source, weights in routed.items()}
        return cls(routed, of_terms, phase.loss.uses_routed)

    def scoring(self, sources: Iterable[str] | None = None) -> frozenset[str]:
        """The teachers that score responses to prompts of these sources; default: of all."""
        names = {name for weights in self.of_terms.values() for name in weights}
        if self.scores_routed:
            names.update(
                name for s in (self.routed if sources is None else sources) for name in self.routed[s]
            )
        return frozenset(names)

    @property
    def named(self) -> frozenset[str]:
        """All teachers that the phase can use, to score or to generate."""
        return self.scoring() | {name for weights in self.routed.values() for name in weights}

    def route(self, prompt: Prompt) -> Prompt:
        """Return a prompt with the teachers that it has in the phase."""
        routed = self.routed[prompt.source]
        return replace(
            prompt,
            teachers=routed if self.scores_routed else {},
            term_teachers=self.of_terms,
            writer=author(routed) if routed else None,
        )


def author(weights: TeacherWeights) -> str:
    """The teacher that generates text for these prompts: the heaviest, the first by name among equals."""
    return min(weights, key=lambda name: (-weights[name], name))


def writer_of(prompt: Prompt) -> str:
    """The teacher that generates responses to a prompt."""
    return prompt.writer or author(prompt.teachers)


def _positive(weights: TeacherWeights) -> dict[str, float]:
    return {name: weight for name, weight in weights.items() if weight}
