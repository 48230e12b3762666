"""Check what phases choose: their prompt sources."""

from __future__ import annotations

from collections.abc import Iterator

from mergeopd.config.locate import Origins, dotted
from mergeopd.config.suggest import did_you_mean
from mergeopd.config.tree import Keys
from mergeopd.errors import Problem
from mergeopd.messages import joined
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
        for name in phase.prompts or ():
            if name not in names:
                where: Keys = ("phases", index, "prompts", name)
                remedy = did_you_mean(name, names, f"sources are {joined(names, 'and')}")
                yield origins.problem(where, f"no source '{name}' in `prompts`", remedy, key=True)
    if not parts.all_phases or used - set(names):  # a misspelt name may be meant for an unused source
        return
    for index, name in parts.source_names.items():
        if name not in used:
            message = f"no phase draws from '{name}'"
            yield origins.problem(("prompts", index), message, "name it in a phase, or remove it")
