"""The student as its own teacher: its plan, and the combinations that could not teach."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mergeopd.config.locate import Origins
from mergeopd.errors import Problem
from mergeopd.recipe.models import SnapshotRule, Student, TeacherRef
from mergeopd.recipe.plan import TeacherPlan
from mergeopd.recipe.training import Phase


def self_plans(refs: Mapping[str, TeacherRef], student: Student) -> dict[str, TeacherPlan]:
    """The teachers that are the student (with its folder), by name."""
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
        )
        for name, ref in refs.items()
        if ref.student is not None
    }


def rule_problems(
    refs: Mapping[str, TeacherRef], phases: Mapping[int, Phase], origins: Origins
) -> Iterator[Problem]:
    """Weights that follow so closely that nothing is left to learn, or so slowly that they never move.

    `phases` must be all of the recipe's.
    """
    num_updates = sum(phase.updates for phase in phases.values())
    last_start = num_updates - phases[len(phases) - 1].updates_per_round
    for name, ref in refs.items():
        every = ref.student.every if isinstance(ref.student, SnapshotRule) else None
        if every is None:
            continue
        where = ("teachers", name, "student")
        # With several updates in a round, all but the first differ from the copy at its start.
        closely = every == 1 and all(phase.updates_per_round == 1 for phase in phases.values())
        if closely and ref.system is None and ref.prompt is None:
            yield origins.problem(
                where,
                "this is the student as it is at every update, with the same prompt: nothing differs, so "
                "there is nothing to learn",
                "show it more with `prompt` or `system`, or use earlier weights: `student: start`",
            )
        elif every > last_start:
            yield origins.problem(
                (*where, "every"),
                f"the last round starts after {last_start} updates, so the weights are never copied anew",
                "use `student: start`, or a smaller number",
            )


def idle_problems(
    refs: Mapping[str, TeacherRef], phases: Mapping[int, Phase], origins: Origins
) -> Iterator[Problem]:
    """A run that begins where all its teachers agree with it, and with nothing else to learn from.

    Its gradient is rounding noise, which AdamW brings to full steps. `refs` and `phases` must be all.
    """
    first = phases[0]
    # At the start of a run all of the student's weights are one.
    differs = any(ref.student is None or ref.system or ref.prompt for ref in refs.values())
    if differs or first.loss.has_outcome or first.loss.nll:
        return
    yield origins.problem(
        ("phases", 0, "loss"),
        "every teacher is the student itself with the same prompt, so at the start of the run nothing "
        "differs, and there is nothing to learn",
        "show a teacher more with `prompt` or `system`, add another teacher, or begin with a phase that has "
        "`outcome` or `nll`",
    )
