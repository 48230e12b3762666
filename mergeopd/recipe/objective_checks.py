"""Objectives whose needs a recipe does not meet: texts, verifiers, groups, teachers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mergeopd.config.locate import Origins
from mergeopd.config.tree import Keys
from mergeopd.errors import Problem
from mergeopd.messages import joined
from mergeopd.recipe.policy_terms import POLICY_TERMS, ClipRatio, NoCorrection, SequenceMask, TrustRegion
from mergeopd.recipe.schema import TrainSource
from mergeopd.recipe.training import Phase, RolloutSettings, never_student
from mergeopd.recipe.verifiers import KINDS as VERIFIERS


def objective_problems(
    phases: Mapping[int, Phase],
    sources: Mapping[int, TrainSource],
    all_sources: bool,
    rollout: RolloutSettings | None,
    origins: Origins,
    *,
    spans: bool,
) -> Iterator[Problem]:
    """What each phase's terms and budgets need and do not get.

    `spans`: some teacher's bridge is a policy term in every phase that asks teachers.
    `all_sources` is False where some prompt source could not be read, so that nobody can say that none has a
    verifier.
    """
    for index, phase in phases.items():
        here: Keys = ("phases", index)
        yield from _policy_problems(phase, here, origins, spans=spans)
        yield from _budget_problems(phase, here, origins)
        if rollout is not None:
            yield from _sequence_mask_problems(phase, here, rollout, origins)
        if needed := _reward_users(phase, here):
            if all_sources:
                yield from _verifier_problems(phase, needed, sources, origins)
            if rollout is not None and rollout.samples_per_prompt == 1:
                yield from _group_problems(phase, needed, origins)


def _policy_problems(phase: Phase, here: Keys, origins: Origins, *, spans: bool) -> Iterator[Problem]:
    terms = [term for term in POLICY_TERMS if phase.loss.uses(term)]
    if terms and never_student(phase):
        message = "a policy term needs answers that the student wrote, and here it writes none"
        remedy = "use a divergence, or `text: student`"
        yield origins.problem((*here, "loss", terms[0]), message, remedy, key=True)
    has_ratio = bool(terms) or (spans and phase.loss.needs_teacher)
    if not has_ratio and not isinstance(phase.correction, NoCorrection):
        message = "nothing to correct: an exact divergence at a visited state needs no importance weight"
        remedy = f"remove it, or add a policy term ({', '.join(POLICY_TERMS)})"
        yield origins.problem((*here, "correction"), message, remedy, key=True)
    if not has_ratio and phase.clip_ratio != ClipRatio():
        message = "nothing to clip: only policy terms have a ratio"
        remedy = f"remove it, or add a policy term ({', '.join(POLICY_TERMS)})"
        yield origins.problem((*here, "clip_ratio"), message, remedy, key=True)
    anchor = phase.loss.outcome.teacher if phase.loss.outcome is not None else None
    if isinstance(anchor, TrustRegion) and phase.clip_ratio is None:
        message = "a trust region without bounds only scales the gradient: its work is done by the clip"
        yield origins.problem((*here, "clip_ratio"), message, "give bounds, or leave the key out")


def _sequence_mask_problems(
    phase: Phase, here: Keys, rollout: RolloutSettings, origins: Origins
) -> Iterator[Problem]:
    """Its band is about numerical mismatch: sampling settings move every answer out of it."""
    settings = {"temperature": rollout.temperature, "top_p": rollout.top_p}
    other = [f"{name} {value:g}" for name, value in settings.items() if value != 1.0]
    if other and isinstance(phase.correction, SequenceMask):
        message = (
            f"answers are sampled at {joined(other, 'and')}, so their mean ratio to the policy shows the "
            "sampling settings, not a mismatch, and sequence_mask would drop nearly all of them"
        )
        remedy = "sample at temperature 1 and top_p 1, or use `truncate`"
        yield origins.problem((*here, "correction"), message, remedy)


def _budget_problems(phase: Phase, here: Keys, origins: Origins) -> Iterator[Problem]:
    balance = phase.balance
    by_verdict = {"pass_rate": balance.pass_rate is not None, "distill_on": balance.distill_on != "all"}
    used = [key for key, is_used in {"follow_gap": bool(balance.follow_gap), **by_verdict}.items() if is_used]
    for key in used:
        where = (*here, "balance", key)
        if not phase.loss.needs_teacher:
            message = f"{key} weighs what teachers say, and no term of the loss asks them"
            yield origins.problem(where, message, "add a teacher's term, or remove it", key=True)
        elif key == "pass_rate" and not phase.loss.has_teacher_term:
            message = (
                "pass_rate weighs terms of teachers, and here they only shape the outcome: it does nothing"
            )
            yield origins.problem(where, message, "add a teacher's term, or remove it", key=True)
        elif key in by_verdict and never_student(phase):
            message = f"{key} goes by the student's own answers, and here it writes none"
            yield origins.problem(where, message, "remove it, or use `text: student`", key=True)


def _reward_users(phase: Phase, here: Keys) -> dict[str, Keys]:
    """What needs rewards, by its name in messages."""
    users: dict[str, Keys] = {}
    if phase.loss.has_outcome:
        users["outcome"] = (*here, "loss", "outcome")
    if phase.balance.pass_rate is not None:
        users["pass_rate"] = (*here, "balance", "pass_rate")
    if phase.balance.distill_on != "all":
        users["distill_on"] = (*here, "balance", "distill_on")
    return users


def _verifier_problems(
    phase: Phase, users: Mapping[str, Keys], sources: Mapping[int, TrainSource], origins: Origins
) -> Iterator[Problem]:
    unchecked = {index: source for index, source in sources.items() if source.verifier is None}
    remedy = f"give the sources a `verifier` ({', '.join(VERIFIERS)})"
    if len(unchecked) == len(sources):
        for name, where in users.items():
            message = f"{name} needs rewards, and no source of prompts has a verifier"
            yield origins.problem(where, message, remedy, key=True)
    elif unchecked and phase.loss.has_outcome and not phase.loss.has_teacher_term:
        names = ", ".join(f"'{source.source}'" for source in unchecked.values())
        message = f"prompts without a verifier would teach nothing in phase '{phase.name}': {names}"
        yield origins.problem(users["outcome"], message, f"{remedy}, or add a teacher's term", key=True)


def _group_problems(phase: Phase, users: Mapping[str, Keys], origins: Origins) -> Iterator[Problem]:
    remedy = "set rollout.samples_per_prompt to 2 or more (8 is usual)"
    if "outcome" in users:
        message = "an answer's advantage is relative to the prompt's other answers, and here it has none"
        yield origins.problem(users["outcome"], message, remedy, key=True)
    rate = phase.balance.pass_rate
    if rate is not None and rate.a and rate.b:
        message = "of one answer a prompt the pass rate is 0 or 1, and p^a (1 - p)^b is 0 at both"
        yield origins.problem(users["pass_rate"], message, remedy, key=True)
