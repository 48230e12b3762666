"""The plans of controls: what they change, what they keep, what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergeopd.errors import RecipeError
from mergeopd.recipe.controls import control_plan
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.resolve import read

COLD = {"name": "cold", "text": "teacher", "updates": 2, "loss": "forward_kl", "prompts_per_round": 3}
MERGE = {"name": "merge", "updates": 4, "loss": {"reverse_kl": 0.5, "jsd": 0.25}, "prompts_per_round": 4}
OUTCOME = {"name": "rl", "updates": 2, "loss": "outcome", "prompts_per_round": 4}


@pytest.fixture
def plan(write_job: Callable[..., Path]) -> Callable[..., Plan]:
    def resolve(*phases: dict[str, Any], **recipe: Any) -> Plan:
        sources = [
            {"source": f"{name}.jsonl", "domain": name, "teachers": teacher, "verifier": "exact"}
            for name, teacher in (("left", "one"), ("right", "two"))
        ]
        rollout = {"max_new_tokens": 6, "samples_per_prompt": 2}
        settings = {"phases": list(phases), "prompts": sources, "rollout": rollout, **recipe}
        resolution = read(write_job(settings))
        assert resolution.plan is not None, resolution.problems
        return resolution.plan

    return resolve


def test_plain_fine_tuning_on_the_teachers_text(plan: Callable[..., Plan]) -> None:
    balance = {"tokens": "equal", "follow_gap": 0.5, "distill_on": "wrong"}
    run = plan(COLD, {**MERGE, "balance": balance, "lr_scale": 0.5, "updates_per_round": 2})
    control = control_plan(run, "sft")
    assert [phase.text for phase in control.phases] == ["teacher", "teacher"]
    losses = [phase.loss.model_dump(exclude_defaults=True) for phase in control.phases]
    assert losses == [{"nll": 1.0}, {"nll": 1.0}]
    assert control.phases[1].balance.model_dump(exclude_defaults=True) == {"tokens": "equal"}
    for key in ("name", "updates", "prompts_per_round", "updates_per_round", "lr_scale", "reduce"):
        assert [getattr(p, key) for p in control.phases] == [getattr(p, key) for p in run.phases]
    assert control.output == f"{run.output}/controls/sft"
    changed = {key for key, value in control if value != getattr(run, key)}
    assert changed == {"name", "phases", "output"}  # the recipe has no evaluation to leave out
    assert control.hash != run.hash


def test_sampled_reverse_kl_has_the_weight_of_the_divergences(plan: Callable[..., Plan]) -> None:
    ramp = {"start": 1.0, "end": 0.5, "updates": 3}
    support = {"top_k": 3}
    others = {"name": "last", "updates": 1, "loss": {"tvd": ramp, "support": support}}
    control = control_plan(plan(COLD, MERGE, others), "sampled")
    losses = [phase.loss.model_dump(exclude_defaults=True) for phase in control.phases]
    assert losses[0] == {"forward_kl": {}}  # weight 1: the text of others stays
    assert losses[1] == {"sampled_reverse_kl": {"weight": 0.75}}
    assert losses[2] == {"sampled_reverse_kl": {"weight": ramp}}


def test_sampled_reverse_kl_in_a_mixture_leaves_nll_for_the_other_text(plan: Callable[..., Plan]) -> None:
    mixture = {"on_policy_fraction": 0.5, "otherwise": "teacher"}
    both = {"reverse_kl": 0.5, "forward_kl": 0.25}
    (phase,) = control_plan(plan({**MERGE, "text": mixture, "loss": both}), "sampled").phases
    assert phase.loss.model_dump(exclude_defaults=True) == {
        "sampled_reverse_kl": {"weight": 0.75},
        "nll": 0.75,
    }
    assert phase.text.model_dump() == mixture  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("control", "phases", "message"),
    [
        ("sft", [MERGE, OUTCOME], "--control sft\n.*phase 'rl' learns from rewards"),
        ("sft", [{**COLD, "loss": "nll"}], "the recipe is this control already"),
        ("sampled", [COLD], "the recipe is this control already"),
        (
            "sampled",
            [{**MERGE, "loss": {"tvd": {"start": 1.0, "end": 0.5, "updates": 3}, "jsd": 1.0}}],
            "tvd and jsd with weights that move apart",
        ),
        (
            "sampled",
            [{**MERGE, "loss": {"reverse_kl": 1.0, "outcome": {"teacher": {"kind": "trust_region"}}}}],
            "trust_region uses the teacher in the ratio",
        ),
    ],
)
def test_recipes_without_such_a_control(
    plan: Callable[..., Plan], control: Any, phases: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        control_plan(plan(*phases), control)
