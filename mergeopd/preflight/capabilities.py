"""Check that rollout engine and teachers provide what the phases need."""

from __future__ import annotations

from collections.abc import Mapping

from mergeopd.config.tree import Keys
from mergeopd.messages import joined
from mergeopd.preflight.problems import Findings
from mergeopd.recipe.plan import TeacherPlan, phase_teachers
from mergeopd.recipe.policy_terms import POLICY_TERMS
from mergeopd.recipe.resolve import Resolution
from mergeopd.recipe.routing import PhaseTeachers, author
from mergeopd.recipe.training import Phase, never_student, reads_teachers
from mergeopd.rollout.protocol import EngineCapabilities
from mergeopd.teacher.protocol import TargetKind, TeacherCapabilities, required_kind

_TARGETS: Mapping[TargetKind, str] = {
    "hidden": "hidden states",
    "top_k": "its most probable tokens",
    "student_top_k": "log-probabilities of the student's most probable tokens",
    "sampled": "log-probabilities of sampled tokens",
}


_HIDDEN_STATES = "start the servers with hidden states and write `hidden_states: true` into the card"


def check_capabilities(
    findings: Findings,
    resolution: Resolution,
    engine: EngineCapabilities | None,
    teachers: Mapping[str, TeacherCapabilities],
) -> None:
    """Report log-probabilities, targets and responses that a phase needs and that nothing provides.

    `engine` is None where `rollout` is not valid; `teachers` has those that resolved.
    """
    for index, phase in resolution.phases.items():
        own = phase_teachers(phase, resolution.sources.values(), resolution.teachers)
        if engine is not None and not engine.returns_logprobs and not never_student(phase):
            _check_engine(findings, index, phase, resolution.teachers, own)
        _check_targets(findings, index, phase, resolution, teachers, own)
        if reads_teachers(phase):
            _check_generators(findings, ("phases", index, "text"), resolution, teachers, own)
        if phase.select is not None and phase.select.teacher_right is not None:
            where: Keys = ("phases", index, "select", "teacher_right")
            _check_generators(findings, where, resolution, teachers, own)
        if phase.select is not None and phase.select.near_teacher is not None:
            _check_near_teachers(findings, index, resolution, teachers, own)


def _check_engine(
    findings: Findings,
    index: int,
    phase: Phase,
    teachers: Mapping[str, TeacherPlan],
    of_phase: PhaseTeachers,
) -> None:
    message = "the rollout engine returns no log-probabilities of its responses"
    for term in POLICY_TERMS:
        if phase.loss.uses(term):
            findings.report(
                ("phases", index, "loss", term),
                f"{message}, and a policy term needs them",
                "use a divergence, or another `rollout.engine`",
            )
    for name, teacher in teachers.items():
        spans = teacher.bridge is not None and teacher.bridge.kind == "span"
        if spans and name in of_phase.scoring():
            findings.report(
                ("teachers", name, "bridge"),
                f"{message}, and `span` is a policy term, which needs them",
                "use another bridge, or another `rollout.engine`",
            )


def _check_targets(
    findings: Findings,
    index: int,
    phase: Phase,
    resolution: Resolution,
    teachers: Mapping[str, TeacherCapabilities],
    of_phase: PhaseTeachers,
) -> None:
    for name in (name for name in resolution.teachers if name in of_phase.scoring()):
        own = teachers[name]
        kind, provided = required_kind(phase.loss, resolution.teachers[name], own), own.can_provide
        if kind is None:
            continue
        if kind in provided:
            if not own.any_temperature and phase.loss.temperature != 1.0 and kind != "hidden":
                findings.report(
                    ("phases", index, "loss", "temperature"),
                    f"servers return log-probabilities of given text at temperature 1 only, also those of "
                    f"teacher '{name}'",
                    f"remove `temperature` from the loss, or {_HIDDEN_STATES}",
                )
            continue
        given = joined([_TARGETS[other] for other in _TARGETS if other in provided], "and") or "no targets"
        findings.report(
            ("phases", index, "loss"),
            f"the loss needs {_TARGETS[kind]} of teacher '{name}', which provides {given}",
            _remedy(resolution.teachers[name], provided),
        )


def _remedy(teacher: TeacherPlan, provided: frozenset[TargetKind]) -> str:
    if teacher.api is not None:
        return "learn its text with `nll` alone, or give the other terms `teachers` of their own"
    if teacher.bridge is not None:
        other = "use another bridge, or another teacher"
        return other if teacher.served is None else f"{_HIDDEN_STATES}, or {other}"
    if teacher.served is not None and "student_top_k" in provided:
        return f"give the loss `support: {{top_k: K, of: student}}` (or `of: teacher`), or {_HIDDEN_STATES}"
    if teacher.served is not None:
        return f"give the loss `support: {{top_k: K, of: teacher}}`, or {_HIDDEN_STATES}"
    if "top_k" in provided:
        return "give the loss `support: {top_k: K, of: teacher}`, or use another teacher"
    if "sampled" in provided:
        return "use `sampled_reverse_kl`, or another teacher"
    return "use another teacher"


def _check_near_teachers(
    findings: Findings,
    index: int,
    resolution: Resolution,
    teachers: Mapping[str, TeacherCapabilities],
    of_phase: PhaseTeachers,
) -> None:
    """Report the first teacher that cannot score the student's tokens in any text."""
    for name in sorted({name for routed in of_phase.routed.values() for name in routed}):
        plan = resolution.teachers.get(name)
        if plan is None or name not in teachers:
            continue
        causes = {
            "has another tokenizer": plan.bridge is not None,
            "has recorded targets only": plan.targets is not None,
            "writes text only": not teachers[name].can_provide,
        }
        if cause := next((text for text, is_so in causes.items() if is_so), None):
            findings.report(
                ("phases", index, "select", "near_teacher"),
                "near_teacher compares log-probabilities of the student's tokens, and teacher "
                f"'{name}' {cause}",
                "use `teacher_right`, or remove it",
            )
            return


def _check_generators(
    findings: Findings,
    where: Keys,
    resolution: Resolution,
    teachers: Mapping[str, TeacherCapabilities],
    of_phase: PhaseTeachers,
) -> None:
    """Report the first source for which no teacher, or one that cannot, would generate."""
    for source, routed in of_phase.routed.items():
        if not routed:
            message = f"no teacher is routed to generate responses to the prompts of '{source}'"
            findings.report(where, message, "give the source `teachers`")
            return
        name = author(routed)
        if name not in teachers or teachers[name].can_generate:
            continue
        other = "give another teacher of these prompts more weight"
        if resolution.teachers[name].residency == "stream":
            cause = "its card has `residency: stream`, and generation needs all layers for every token"
            remedy = "write `residency: auto`, which streams it only to score, or use other `text`"
        elif resolution.teachers[name].snapshot_rule is None:
            cause, remedy = "it cannot generate", f"{other}, or use other `text`"
        else:
            cause = "responses are generated before a phase, and its weights change during it"
            remedy = f"{other}, or use `student: start`"
        message = f"teacher '{name}' would generate responses to the prompts of '{source}', but {cause}"
        findings.report(where, message, remedy)
        return
