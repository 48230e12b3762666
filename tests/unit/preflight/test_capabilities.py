"""Phases that need what an engine or a teacher does not provide are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergeopd.errors import RecipeError
from mergeopd.preflight.inputs import preflight
from mergeopd.rollout.protocol import EngineCapabilities
from mergeopd.teacher.protocol import TargetKind, TeacherCapabilities

Write = Callable[..., Path]
SILENT = EngineCapabilities(returns_logprobs=False, is_reproducible=True, needs_replica=True)
TOP_K = {"support": {"top_k": 2, "of": "teacher"}, "reverse_kl": 1.0}


def provides(*kinds: TargetKind, can_generate: bool = False) -> TeacherCapabilities:
    return TeacherCapabilities(frozenset(kinds), can_generate)


def problems(write_job: Write, phase: dict[str, Any], **capabilities: Any) -> list[tuple[str, str, str]]:
    """Place, cause and remedy of what is wrong with a job of this phase."""
    phases = [{"name": "merge", "updates": 2, "prompts_per_round": 4, **phase}]
    recipe = write_job({"phases": phases, "rollout": {"samples_per_prompt": 2, "max_new_tokens": 6}})
    try:
        preflight(recipe, **capabilities)
    except RecipeError as error:
        return [(found.path, found.message, found.remedy) for found in error.problems]
    return []


def test_policy_terms_need_an_engine_with_log_probabilities(write_job: Write) -> None:
    phase = {"loss": {"reverse_kl": 1.0, "sampled_reverse_kl": 1.0}}
    assert problems(write_job, phase) == []
    assert problems(write_job, phase, engine=SILENT) == [
        (
            "phases[0].loss.sampled_reverse_kl",
            "the rollout engine returns no log-probabilities of its responses, and a policy term needs them",
            "use a divergence, or another `rollout.engine`",
        )
    ]


@pytest.mark.parametrize("phase", [{"loss": "reverse_kl"}, {"loss": "forward_kl", "text": "dataset"}])
def test_divergences_do_not(write_job: Write, phase: dict[str, Any]) -> None:
    assert problems(write_job, phase, engine=SILENT) == []


@pytest.mark.parametrize(
    ("loss", "kinds", "needed", "given", "remedy"),
    [
        (
            "reverse_kl",
            ("top_k", "sampled"),
            "hidden states",
            "its most probable tokens and log-probabilities of sampled tokens",
            "give the loss `support: {top_k: K, of: teacher}`, or use another teacher",
        ),
        (
            TOP_K,
            ("sampled",),
            "its most probable tokens",
            "log-probabilities of sampled tokens",
            "use `sampled_reverse_kl`, or another teacher",
        ),
        (
            "sampled_reverse_kl",
            (),
            "log-probabilities of sampled tokens",
            "no targets",
            "use another teacher",
        ),
    ],
)
def test_a_loss_needs_a_target_that_every_teacher_provides(
    write_job: Write, loss: object, kinds: tuple[TargetKind, ...], needed: str, given: str, remedy: str
) -> None:
    message = f"the loss needs {needed} of teacher 'two', which provides {given}"
    found = problems(write_job, {"loss": loss}, teachers={"two": provides(*kinds)})
    assert found == [("phases[0].loss", message, remedy)]


@pytest.mark.parametrize(
    ("loss", "kind"), [("reverse_kl", "hidden"), (TOP_K, "top_k"), ("sampled_reverse_kl", "sampled")]
)
def test_provided_targets_are_sufficient(write_job: Write, loss: object, kind: TargetKind) -> None:
    assert problems(write_job, {"loss": loss}, teachers={"two": provides(kind)}) == []


def test_text_of_a_teacher_that_cannot_generate(write_job: Write) -> None:
    phase = {"loss": "reverse_kl", "text": {"on_policy_fraction": 0.5, "otherwise": "teacher"}}
    assert problems(write_job, phase, teachers={"two": provides("hidden", can_generate=True)}) == []
    assert problems(write_job, phase, teachers={"two": provides("hidden")}) == [
        (
            "phases[0].text",
            "teacher 'two' would generate responses to the prompts of 'right', but it cannot generate",
            "give another teacher of these prompts more weight, or use other `text`",
        )
    ]
    assert problems(write_job, {"loss": "reverse_kl"}, teachers={"two": provides("hidden")}) == []
