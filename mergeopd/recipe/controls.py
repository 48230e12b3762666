"""Controls: simpler methods at a run's updates and prompts, to compare its result with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from mergeopd.errors import RecipeError
from mergeopd.messages import joined, option_problem
from mergeopd.recipe.loss_terms import DIVERGENCE_TERMS, Loss
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.policy_terms import ClipRatio, NoCorrection, SampledTerm, TeacherTerm, WeightRamp
from mergeopd.recipe.training import Phase, never_student, only_student

Control = Literal["sft", "sampled"]
CONTROLS: Mapping[Control, str] = {"sft": "SFT on expert text", "sampled": "sampled reverse KL"}
"""Titles by name."""
FOLDER = "controls"  # of the run folder


def control_plan(plan: Plan, control: Control) -> Plan:
    """Return the plan of a control: other losses, its own folder below the run's, and no evaluation.

    Updates, prompts per round, samples per prompt, optimizer and seed are those of the plan. `sft` learns by
    NLL from text that the teachers generate; `sampled` replaces the divergences on the student's text by
    sampled reverse KL of the same weight, and in mixtures those on other text by NLL of the same weight.

    Raises RecipeError where the recipe has no such counterpart.
    """
    change = _sft if control == "sft" else _sampled
    if control == "sampled":
        _check_bridges(plan)
    phases = tuple(phase if plan.reads_documents(phase) else change(phase) for phase in plan.phases)
    if phases == plan.phases:
        raise _refusal(control, "the recipe is this control already", "run it without --control")
    # A control learns from other text than the run, or needs other targets.
    teachers = {name: one.model_copy(update={"targets": None}) for name, one in plan.teachers.items()}
    return plan.model_copy(
        update={
            "teachers": teachers,
            "name": f"{plan.name}-{control}",
            "phases": phases,
            "evaluation": None,
            "output": str(Path(plan.output) / FOLDER / control),
        }
    )


def _sft(phase: Phase) -> Phase:
    loss = phase.loss
    if not (loss.has_teacher_term or loss.nll):
        raise _refusal(
            "sft",
            f"phase '{phase.name}' learns from rewards, which expert text does not have",
            "compare with a recipe of its own",
        )
    balance = phase.balance.model_copy(update={"follow_gap": 0.0, "pass_rate": None, "distill_on": "all"})
    changes = {"text": "teacher", "loss": Loss(nll=1.0), "balance": balance}
    return phase.model_copy(update={**changes, **_NO_POLICY})


def _sampled(phase: Phase) -> Phase:
    loss = phase.loss
    if never_student(phase) or not loss.has_divergence:
        return phase
    used = [term for term in DIVERGENCE_TERMS if loss.uses(term)]
    weight = _weight(phase, [*used, *(["sampled_reverse_kl"] if loss.uses("sampled_reverse_kl") else [])])
    changes: dict[str, Any] = {term: Loss.model_fields[term].default for term in used}
    changes |= {
        "sampled_reverse_kl": SampledTerm(weight=weight, teachers=getattr(loss, used[0]).teachers),
        "temperature": 1.0,
        "support": None,
    }
    if not only_student(phase):
        changes["nll"] = loss.nll or weight
    try:
        changed = Loss.model_validate(loss.model_dump() | changes)
    except ValidationError as error:
        raise _refusal(
            "sampled", f"phase '{phase.name}': {error.errors()[0]['msg']}", "compare with a recipe of its own"
        ) from None
    return phase.model_copy(update={"loss": changed})


_NO_POLICY = {"clip_ratio": ClipRatio(), "correction": NoCorrection(kind="none")}


def _weight(phase: Phase, terms: list[str]) -> float | WeightRamp:
    """Return the sum of the terms' weights."""
    values: list[TeacherTerm] = [getattr(phase.loss, term) for term in terms]
    if any(value.teachers != values[0].teachers for value in values):
        raise _refusal(
            "sampled",
            f"phase '{phase.name}' has {joined(terms, 'and')} with different teachers",
            "compare with a recipe of its own",
        )
    weights: list[float | WeightRamp] = [value.weight for value in values]
    numbers = [weight for weight in weights if not isinstance(weight, WeightRamp)]
    if len(weights) == 1:
        return weights[0]
    if len(numbers) < len(weights):
        raise _refusal(
            "sampled",
            f"phase '{phase.name}' has {joined(terms, 'and')} with weights that move apart",
            "compare with a recipe of its own",
        )
    return float(sum(numbers))


def _check_bridges(plan: Plan) -> None:
    bridged = [name for name, teacher in plan.teachers.items() if teacher.bridge is not None]
    if bridged:
        raise _refusal(
            "sampled",
            f"the bridge of teacher '{bridged[0]}' replaces sampled reverse KL, too",
            "compare with a recipe of its own that has `bridge: span`",
        )


def _refusal(control: Control, message: str, remedy: str) -> RecipeError:
    return RecipeError([option_problem(f"--control {control}", message, remedy)])
