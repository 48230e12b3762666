"""The parts of a recipe that are valid by themselves, although others may not be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from mergeopd.config.tree import Keys
from mergeopd.config.values import FunctionPath
from mergeopd.recipe.models import Student, Teacher, TeacherRef
from mergeopd.recipe.rollout import AnyRollout
from mergeopd.recipe.schema import Checkpoints, EvalSource, Evaluation, Reports, TrainSource
from mergeopd.recipe.training import Optimizer, Phase, needs_routed
from mergeopd.recipe.verifiers import RewardModelVerifier

T = TypeVar("T")

_TEACHER: TypeAdapter[TeacherRef] = TypeAdapter(Teacher)
_ALLOW_CODE: TypeAdapter[tuple[str, ...]] = TypeAdapter(tuple[FunctionPath, ...])


class ValidParts:
    """The sections and entries that are valid by themselves; None or left out otherwise.

    `source_names` are the names of the sources in `prompts`, by index.
    `names` are all teachers, including those with an invalid entry; `all_*`: every entry is valid.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        teachers = data["teachers"] if isinstance(data.get("teachers"), dict) else {}
        prompts, phases = _entries(data, "prompts"), _entries(data, "phases")
        evaluation = data["evaluation"] if isinstance(data.get("evaluation"), dict) else {}
        refs = {name: _valid(_TEACHER, value) for name, value in teachers.items()}
        self.student = _valid(TypeAdapter(Student), data.get("student"))
        self.names = tuple(teachers)
        self.teachers = {name: ref for name, ref in refs.items() if ref is not None}
        self.prompts = _all_valid(TrainSource, prompts)
        self.source_names = source_names(self.prompts)
        self.all_prompts = bool(prompts) and len(self.prompts) == len(prompts)
        self.rollout = _valid(TypeAdapter(AnyRollout), data.get("rollout", {}))
        self.phases = _all_valid(Phase, phases)
        self.all_phases = bool(phases) and len(self.phases) == len(phases)
        self.optimizer = _valid(TypeAdapter(Optimizer), data.get("optimizer", {}))
        self.eval_sources = _all_valid(EvalSource, _entries(evaluation, "prompts"))
        self.evaluation = _valid(TypeAdapter(Evaluation), data.get("evaluation"))
        self.checkpoint = _valid(TypeAdapter(Checkpoints), data.get("checkpoint", {}))
        self.allow_code = _valid(_ALLOW_CODE, data.get("allow_code", []))
        self.report = _valid(TypeAdapter(Reports), data.get("report", {}))
        self.output = data["output"] if isinstance(data.get("output"), str) else None

    @property
    def cards(self) -> dict[Keys, str]:
        """The paths of the cards of teachers and reward models, by the place that names them."""
        named: dict[Keys, str] = {
            ("teachers", name, "card"): ref.card
            for name, ref in self.teachers.items()
            if ref.card is not None
        }
        sources: dict[Keys, TrainSource | EvalSource] = {
            **{("prompts", index): source for index, source in self.prompts.items()},
            **{("evaluation", "prompts", index): source for index, source in self.eval_sources.items()},
        }
        for place, source in sources.items():
            if isinstance(source.verifier, RewardModelVerifier):
                named[*place, "verifier", "card"] = source.verifier.card
        return named

    def sources_of(self, phase: Phase) -> dict[int, TrainSource]:
        """The valid sources that a phase draws from, by index."""
        written = phase.prompts
        return {i: s for i, s in self.prompts.items() if written is None or self.source_names[i] in written}

    def unknown_sources(self, phase: Phase) -> list[str]:
        """Names in a phase's `prompts` that no source has."""
        return [name for name in phase.prompts or () if name not in self.source_names.values()]

    def needs_teacher(self, source: int) -> bool:
        """Whether a phase may need teachers that the source itself is routed to."""
        phases = [p for p in self.phases.values() if p.teachers is None and source in self.sources_of(p)]
        return not self.all_phases or any(map(needs_routed, phases))


def source_names(sources: Mapping[int, TrainSource]) -> dict[int, str]:
    """Return the name of each source: its own, or that of its file without suffix, numbered if it is taken.

    A name that several sources give themselves is theirs here.
    """
    names = {index: source.name for index, source in sources.items() if source.name is not None}
    taken = set(names.values())
    for index, source in sources.items():
        if source.name is not None:
            continue
        stem = PurePath(source.source).stem
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}#{number}"
        names[index] = name
        taken.add(name)
    return names


def _valid(adapter: TypeAdapter[T], value: Any) -> T | None:
    try:
        return adapter.validate_python(value)
    except ValidationError:
        return None


def _entries(data: Mapping[str, Any], name: str) -> list[Any]:
    return data[name] if isinstance(data.get(name), list) else []


def _all_valid(model: type[T], values: list[Any]) -> dict[int, T]:
    adapter = TypeAdapter(model)
    return {i: part for i, value in enumerate(values) if (part := _valid(adapter, value)) is not None}
