"""Self-teachers: their plans, and checks of combinations from which nothing can be learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mergeopd.config.locate import Origins
from mergeopd.errors import Problem
from mergeopd.recipe.models import SnapshotRule, Student, TeacherRef
from mergeopd.recipe.plan import TeacherPlan
from mergeopd.recipe.routing import PhaseTeachers
from mergeopd.recipe.valid_parts import ValidParts


def self_plans(refs: Mapping[str, TeacherRef], student: Student) -> dict[str, TeacherPlan]:
    """Create the plans of self-teachers, by name. `student` has its resolved folder."""
    return {
        name: TeacherPlan(
            name=name,
            student=ref.student,
            model=student.model,
            tokenizer=student.model,
            template=None,
            dtype=ref.dtype or student.dtype,
            system=ref.system,
            prompt=ref.prompt,
            fingerprint=None,
            canary=None,
            bridge=None,
            weight=ref.weight,
            quantize=ref.quantize,
        )
        for name, ref in refs.items()
        if ref.student is not None
    }


def rule_problems(parts: ValidParts, origins: Origins) -> Iterator[Problem]:
    """Report snapshots that always equal the student, or are never updated. Every phase must be valid."""
    phases = parts.phases
    num_updates = sum(phase.updates for phase in phases.values())
    last_start = num_updates - phases[len(phases) - 1].updates_per_round
    for name, ref in parts.teachers.items():
        every = ref.student.every if isinstance(ref.student, SnapshotRule) else None
        if every is None:
            continue
        where = ("teachers", name, "student")
        # With several updates per round, the student differs from the snapshot after the first.
        is_current = every == 1 and all(phase.updates_per_round == 1 for phase in phases.values())
        if is_current and ref.system is None and ref.prompt is None:
            yield origins.problem(
                where,
                "this teacher always has the current weights and the prompt of the student, so there is "
                "nothing to learn from it",
                "give it a `prompt` or a `system` message, or use earlier weights: `student: start`",
            )
        elif every > last_start:
            yield origins.problem(
                (*where, "every"),
                f"the last round starts after {last_start} updates, so no new snapshot is ever taken",
                "use `student: start`, or a smaller number",
            )


def idle_problems(parts: ValidParts, teachers: PhaseTeachers, origins: Origins) -> Iterator[Problem]:
    """Report a first phase in which all `teachers` equal the student and there is no other loss.

    Its gradient would be rounding noise, which AdamW scales to full steps. Every teacher and phase
    must be valid.
    """
    first = parts.phases[0]
    # At the start of a run, all snapshots equal the student.
    refs = [parts.teachers[name] for name in teachers.scoring()]
    differs = any(ref.student is None or ref.system or ref.prompt for ref in refs)
    if not refs or differs or first.loss.has_outcome or first.loss.nll:
        return
    yield origins.problem(
        ("phases", 0, "loss"),
        "at the start of the run, every teacher equals the student and has its prompt, so there is nothing "
        "to learn",
        "give a teacher a `prompt` or a `system` message, add another teacher, or begin with a phase that "
        "has `outcome` or `nll`",
    )
