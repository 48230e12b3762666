"""Phases and grids under which a teacher with another tokenizer could not teach what they ask of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mergeopd.config.locate import Origins
from mergeopd.config.tree import Keys
from mergeopd.errors import Problem
from mergeopd.recipe.models import Student, TeacherRef
from mergeopd.recipe.training import Phase, never_student


def bridge_problems(
    refs: Mapping[str, TeacherRef], phases: Mapping[int, Phase], student: Student | None, origins: Origins
) -> Iterator[Problem]:
    """What bridged teachers cannot give; `refs` and `phases` are those that could be read."""
    bridged = {name: ref.bridge for name, ref in refs.items() if ref.bridge is not None}
    if not bridged:
        return
    first = next(iter(bridged))
    for index, phase in phases.items():
        here: Keys = ("phases", index)
        if phase.balance.follow_gap:
            message = f"follow_gap compares token by token, and teacher '{first}' has other tokens"
            yield origins.problem((*here, "balance", "follow_gap"), message, "remove it", key=True)
        outcome = phase.loss.outcome
        if outcome is not None and outcome.teacher is not None:
            message = f"outcome.teacher needs a log-probability of each token, and '{first}' has other tokens"
            remedy = "remove it: a bridge teaches beside the outcome"
            yield origins.problem((*here, "loss", "outcome", "teacher"), message, remedy, key=True)
        sampled = phase.loss.sampled_reverse_kl
        if sampled is not None and sampled.needs_whole_answers and len(bridged) == len(refs):
            key = "discount" if sampled.discount else "early_gain"
            message = f"{key} weighs log-ratios of single tokens, and every teacher has other tokens"
            remedy = "remove it: the bridges use the weight of the term alone"
            yield origins.problem((*here, "loss", "sampled_reverse_kl", key), message, remedy, key=True)
    for name, bridge in bridged.items():
        if bridge.kind == "span":
            yield from _span_problems(name, phases, origins)
        elif student is not None and student.parallel.tensor > 1:
            message = f"{bridge.kind} compares whole vocabularies; here a process has a part of the student's"
            remedy = "use `bridge: span`, or student.parallel.tensor: 1"
            yield origins.problem(("teachers", name, "bridge"), message, remedy)


def _span_problems(name: str, phases: Mapping[int, Phase], origins: Origins) -> Iterator[Problem]:
    where: Keys = ("teachers", name, "bridge")
    asked = [phase for phase in phases.values() if phase.loss.needs_teacher]
    idle = next((phase for phase in asked if never_student(phase) and not phase.loss.nll), None)
    if idle is not None:
        message = (
            f"span learns from answers that the student wrote, and in phase '{idle.name}' it writes none"
        )
        yield origins.problem(where, message, "add `nll` to its loss, or use another bridge")
    warm = next((phase for phase in asked if phase.loss.temperature != 1.0), None)
    if warm is not None:
        message = f"span is about the policy itself, at temperature 1, and phase '{warm.name}' has another"
        yield origins.problem(where, message, "remove the temperature, or use another bridge")
