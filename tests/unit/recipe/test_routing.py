"""The teachers of a phase: those of its sources, selected and weighted, and those that no source names."""

from __future__ import annotations

from typing import Any

import pytest

from mergeopd.recipe.routing import PhaseTeachers, writer_of
from mergeopd.recipe.training import Phase
from mergeopd.types import Message, Prompt

SOURCES = {"math": {"maths": 1.0, "chat": 0.2}, "chat": {"chat": 0.8}, "documents": {}}
OWN = {"maths": 1.0, "chat": 0.4, "past": 0.5, "sage": 2.0}


def teachers_of(**settings: Any) -> PhaseTeachers:
    phase = Phase.model_validate({"name": "p", "updates": 1, "loss": "reverse_kl", **settings})
    return PhaseTeachers.of(phase, SOURCES, OWN)


def test_without_teachers_of_the_phase_sources_keep_theirs() -> None:
    resolved = teachers_of()
    assert resolved.routed == SOURCES
    assert resolved.scoring() == {"maths", "chat"}
    assert resolved.scoring(["chat"]) == {"chat"}


def test_a_routed_teacher_keeps_to_its_sources_and_another_teaches_all() -> None:
    resolved = teachers_of(teachers={"maths": 3.0, "past": 0.1, "sage": 0.0})
    past = pytest.approx(0.05)
    assert resolved.routed == {
        "math": {"maths": 3.0, "past": past},
        "chat": {"past": past},
        "documents": {"past": past},
    }
    assert resolved.scoring() == {"maths", "past"}


def test_teachers_of_a_term_score_every_prompt_and_generate_none() -> None:
    loss = {"nll": 1.0, "reverse_kl": {"teachers": ["past"], "weight": 0.3}}
    resolved = teachers_of(loss=loss, text="teacher")
    assert resolved.of_terms == {"reverse_kl": {"past": 0.5}}
    assert resolved.scoring() == {"past"}
    prompt = resolved.route(Prompt("math:0", "math", "math", (Message("user", "1"),)))
    assert (prompt.scorers, writer_of(prompt)) == (("past",), "maths")
    assert prompt.teacher_weight("past", "reverse_kl") == 0.5
    assert prompt.teacher_weight("past", "forward_kl") == 0.0
