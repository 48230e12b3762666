"""Check the folders of teachers' targets: the text is fixed, and targets and teacher are those needed now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mergeopd.config.tree import Keys
from mergeopd.messages import joined, shown
from mergeopd.preflight.problems import Findings
from mergeopd.recipe.plan import TeacherPlan, phase_teachers
from mergeopd.recipe.resolve import Resolution
from mergeopd.recipe.training import never_student
from mergeopd.teacher.protocol import TargetSpec, required_of
from mergeopd.teacher.target_folder import Manifest, TargetOrigin, check_sizes, covering, read_manifest

CurrentOrigin = Callable[[TeacherPlan, TargetSpec], TargetOrigin | None]


def check_recorded(findings: Findings, resolution: Resolution, current: CurrentOrigin | None) -> None:
    """Report teachers with `targets` that score text of the student, and folders of something else.

    `current` describes a teacher's targets now, None if it could not be read; without it, folders are not
    looked into.
    """
    for teacher in resolution.teachers.values():
        if teacher.targets is None:
            continue
        place: Keys = ("teachers", teacher.name, "targets")
        needed = _needed(findings, place, resolution, teacher)
        if needed and current is not None:
            _check_folder(findings, place, teacher, Path(teacher.targets), needed, current)


def _needed(
    findings: Findings, place: Keys, resolution: Resolution, teacher: TeacherPlan
) -> list[TargetSpec]:
    """Return the targets that phases need of a teacher; report phases whose text is not known before."""
    needed, is_used = [], False
    for phase in resolution.phases.values():
        own = phase_teachers(phase, resolution.sources.values(), resolution.teachers)
        spec = required_of(phase.loss, teacher)
        if spec is None or teacher.name not in own.scoring():
            continue
        is_used = True
        if phase.select is not None:
            findings.report(
                place,
                f"phase '{phase.name}' selects its prompts when it starts, so targets of teacher "
                f"'{teacher.name}' cannot be recorded for it before",
                "remove `select`, or `targets`",
            )
        elif never_student(phase):
            needed.append(spec)
        else:
            findings.report(
                place,
                f"phase '{phase.name}' has text of the student, which is not known before the run, so "
                f"targets of teacher '{teacher.name}' cannot be recorded for it",
                "give the phase `text: dataset` or `text: teacher`, or remove `targets`",
            )
    if resolution.phases and not is_used:
        findings.report(place, f"no phase learns from teacher '{teacher.name}'", "remove `targets`")
    return needed


def _check_folder(
    findings: Findings,
    place: Keys,
    teacher: TeacherPlan,
    folder: Path,
    needed: list[TargetSpec],
    current: CurrentOrigin,
) -> None:
    where, again = shown(folder), "`mergeopd targets RECIPE` writes them"

    def read() -> Manifest | None:
        manifest = read_manifest(folder)
        if manifest is not None:
            check_sizes(folder, manifest.shards)
        return manifest

    num_before = len(findings.problems)
    manifest = findings.attempt(place, read)
    if manifest is None:
        if len(findings.problems) == num_before:
            begun = folder.is_dir() and any(folder.glob("*.safetensors"))
            state = "is not complete" if begun else "has no targets yet"
            findings.report(place, f"{where} {state} (no manifest.json)", again)
        return
    now = current(teacher, covering(needed))
    other = f"name another folder, or delete this one, and {again}"
    if now is not None and (differences := list(manifest.origin.differences(now))):
        findings.report(
            place, f"{where} has the targets of another teacher: {joined(differences, 'and')}", other
        )
    for spec in needed:
        if not manifest.origin.serves(spec):
            message = f"{where} has {described(manifest.origin.spec)}, and a phase needs {described(spec)}"
            findings.report(place, message, other)


def described(spec: TargetSpec) -> str:
    """Describe a kind of target in words."""
    if spec.kind == "hidden":
        return "hidden states"
    return f"the top {spec.k} tokens at temperature {spec.temperature:g}"
