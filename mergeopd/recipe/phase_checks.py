"""Check what phases choose: their prompt sources and teachers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mergeopd.config.locate import Origins, dotted
from mergeopd.config.suggest import did_you_mean
from mergeopd.config.tree import Keys
from mergeopd.errors import Problem
from mergeopd.messages import joined
from mergeopd.recipe.routing import PhaseTeachers, TeacherWeights
from mergeopd.recipe.training import needs_routed, never_student, reads_dataset
from mergeopd.recipe.valid_parts import ValidParts


def name_problems(parts: ValidParts, origins: Origins) -> Iterator[Problem]:
    """Report names that several sources give themselves."""
    first: dict[str, int] = {}
    for index, source in parts.prompts.items():
        if source.name is not None and first.setdefault(source.name, index) != index:
            message = f"the source at {dotted(('prompts', first[source.name]))} has this name, too"
            yield origins.problem(("prompts", index, "name"), message, "give each source its own name")


def draw_problems(parts: ValidParts, origins: Origins) -> Iterator[Problem]:
    """Report phases that draw from unknown sources, and sources from which no phase draws."""
    if not parts.all_prompts:
        return
    names = tuple(dict.fromkeys(parts.source_names.values()))
    used: set[str] = set()
    for index, phase in parts.phases.items():
        used |= set(names if phase.prompts is None else phase.prompts)
        for name in parts.unknown_sources(phase):
            where: Keys = ("phases", index, "prompts", name)
            remedy = did_you_mean(name, names, f"sources are {joined(names, 'and')}")
            yield origins.problem(where, f"no source '{name}' in `prompts`", remedy, key=True)
        yield from _document_problems(parts, index, origins)
    if not parts.all_phases or used - set(names):  # a misspelt name may be meant for an unused source
        return
    for index, name in parts.source_names.items():
        if name not in used:
            message = f"no phase draws from '{name}'"
            yield origins.problem(("prompts", index), message, "name it in a phase, or remove it")


def _document_problems(parts: ValidParts, index: int, origins: Origins) -> Iterator[Problem]:
    """Report a phase that would generate responses to documents."""
    phase = parts.phases[index]
    if never_student(phase) and reads_dataset(phase):
        return
    for i, source in parts.sources_of(phase).items():
        if source.text_field is not None:
            message = (
                f"'{parts.source_names[i]}' has documents without prompts, and this phase generates responses"
            )
            remedy = "use `text: dataset`, or draw from other sources with `prompts`"
            yield origins.problem(("phases", index, "text"), message, remedy)


def teacher_problems(parts: ValidParts, origins: Origins) -> Iterator[Problem]:
    """Report unknown teachers of phases and terms, zero weights, and teachers that nothing uses."""
    for index, phase in parts.phases.items():
        here: Keys = ("phases", index)
        written: dict[Keys, TeacherWeights] = {
            (*here, "loss", term, "teachers"): teachers for term, teachers in phase.loss.term_teachers.items()
        }
        if phase.teachers is not None:
            written[*here, "teachers"] = phase.teachers
        for where, teachers in written.items():
            for name in teachers:
                if name not in parts.names:
                    remedy = did_you_mean(name, parts.names, f"teachers are {joined(parts.names, 'and')}")
                    yield origins.problem((*where, name), f"unknown teacher '{name}'", remedy, key=True)
            if not any(teachers.values()):
                message = f"every teacher has weight 0 here ({', '.join(teachers)})"
                yield origins.problem(where, message, "give one a positive weight")
        if phase.teachers is not None and not needs_routed(phase):
            message = "no teacher generates text in this phase, and "
            message += (
                "every term has teachers of its own" if phase.loss.needs_teacher else "no term needs one"
            )
            yield origins.problem((*here, "teachers"), message, "remove it", key=True)


def route_problems(
    parts: ValidParts, of_phases: Mapping[int, PhaseTeachers], origins: Origins
) -> Iterator[Problem]:
    """Report sources without a teacher in a phase that names its teachers. All routes must be known."""
    for index, phase in parts.phases.items():
        if phase.teachers is None or not needs_routed(phase) or not any(phase.teachers.values()):
            continue
        bare = [source for source, teachers in of_phases[index].routed.items() if not teachers]
        if bare and set(phase.teachers) <= set(parts.names):
            message = f"the prompts of {joined([repr(name) for name in bare], 'and')} have no teacher here"
            remedy = "name one of their teachers, or draw from other sources with `prompts`"
            yield origins.problem(("phases", index, "teachers"), message, remedy, key=True)
