"""Resolve a recipe file to a Plan, or to all of its problems."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergeopd.config.folders import HERE, Lookup, Missing, absolute, existing_file, unwritable
from mergeopd.config.load import load
from mergeopd.config.locate import Origins
from mergeopd.config.tree import Keys, plain
from mergeopd.config.validate import problems_of
from mergeopd.distributed.launch import available_cores
from mergeopd.errors import Problem
from mergeopd.messages import shown
from mergeopd.recipe import checks
from mergeopd.recipe.cards import CardFile, ResolvedTeachers, read_cards, resolve_teachers
from mergeopd.recipe.hints import HINTS
from mergeopd.recipe.models import Student
from mergeopd.recipe.objective_checks import bridge_problems, objective_problems
from mergeopd.recipe.phase_checks import draw_problems, name_problems, route_problems, teacher_problems
from mergeopd.recipe.plan import EvaluationPlan, Plan, SourcePlan, TeacherPlan
from mergeopd.recipe.rollout import AnyRollout, with_paths
from mergeopd.recipe.routing import PhaseTeachers
from mergeopd.recipe.schema import NAMED, SHORTHANDS, Recipe
from mergeopd.recipe.self_teacher_checks import idle_problems, rule_problems, self_plans
from mergeopd.recipe.sources import Router, SourceResolver
from mergeopd.recipe.suites import best_problems, suite_problems, suites
from mergeopd.recipe.training import Phase
from mergeopd.recipe.valid_parts import ValidParts


@dataclass(frozen=True)
class Resolution:
    """The result of resolving a recipe.

    `plan` is None as soon as anything is wrong. `sources` and `eval_sources` hold the entries of `prompts`
    and `evaluation.prompts` (by index) whose files and verifiers were found, `teachers` those whose card and
    folders (or the student's) were: they can be looked into although something else is wrong. `student` has
    its model's folder. `rollout` and `phases` (by index) are valid; there are no phases unless all routes
    from prompts to teachers are known. `document` is the recipe as written, with what it extends and
    overrides.
    """

    plan: Plan | None
    problems: tuple[Problem, ...]
    origins: Origins
    teachers: Mapping[str, TeacherPlan] = field(default_factory=dict)
    sources: Mapping[int, SourcePlan] = field(default_factory=dict)
    eval_sources: Mapping[int, SourcePlan] = field(default_factory=dict)
    student: Student | None = None
    rollout: AnyRollout | None = None
    phases: Mapping[int, Phase] = field(default_factory=dict)
    document: Mapping[str, Any] = field(default_factory=dict)


def read(
    path: str | Path,
    overrides: Sequence[str] = (),
    env: Mapping[str, str] = os.environ,
    lookup: Lookup = HERE,
) -> Resolution:
    """Read and resolve a recipe and its teacher cards. An invalid recipe does not raise.

    Args:
        path: the recipe.
        overrides: `a.b=c`, applied in order to the recipe.
        env: values of `${VARIABLE}`.
        lookup: how files are found.

    Returns:
        The plan, or all problems. Prompt files, tokenizers and weights are located, but not opened.
    """
    file = Path(path)
    loaded = load(file, overrides, env, SHORTHANDS, NAMED)
    root = loaded.root
    if root is None or not loaded.complete:
        origins = Origins(file, root, {})
        of_schema = () if root is None else _schema_problems(plain(root), origins, complete=False)
        return Resolution(None, _ordered(loaded.problems, of_schema, origins), origins)
    data = plain(root)
    parts = ValidParts(data)
    cards = read_cards(parts.cards, root, env)
    roots = {place: c.root for place, c in cards.items() if isinstance(c, CardFile) and c.root is not None}
    origins = Origins(file, root, roots)
    if parts.rollout is not None:
        parts.rollout = with_paths(parts.rollout, lambda key: origins.place(("rollout", *key)).base)
    of_schema = _schema_problems(data, origins, complete=True)
    with_cards = resolve_teachers(parts.teachers, cards, origins, lookup)
    unreadable = tuple(p for c in cards.values() if isinstance(c, CardFile) for p in c.problems)
    is_valid = not (of_schema or loaded.problems or unreadable)
    resolver = _Resolver(parts, cards, with_cards, origins, is_valid, lookup)
    resolver.run()
    later = (*of_schema, *with_cards.problems, *resolver.problems)
    problems = _ordered((*loaded.problems, *unreadable), later, origins)
    plan = None if problems else resolver.plan(Recipe.model_validate(data), file)
    return Resolution(
        plan,
        problems,
        origins,
        resolver.teachers,
        resolver.sources,
        resolver.eval_sources,
        resolver.student,
        parts.rollout,
        parts.phases if resolver.routed else {},
        data,
    )


def _schema_problems(data: Any, origins: Origins, *, complete: bool) -> tuple[Problem, ...]:
    return problems_of(Recipe, data, origins, complete=complete, also_allowed=("extends",), hints=HINTS)


def _ordered(first: Sequence[Problem], later: Sequence[Problem], origins: Origins) -> tuple[Problem, ...]:
    """Sort all problems; those of `later` at the same location as one of `first` only repeat it."""
    reported = {problem.location for problem in first}
    return origins.in_order([*first, *(problem for problem in later if problem.location not in reported)])


class _Resolver:
    """Finds the files that the parts name, and checks the parts against each other."""

    def __init__(
        self,
        parts: ValidParts,
        cards: Mapping[Keys, CardFile | Missing],
        with_cards: ResolvedTeachers,
        origins: Origins,
        is_valid: bool,
        lookup: Lookup,
    ) -> None:
        self.parts = parts
        self.cards = cards
        self.with_cards = with_cards
        self.origins = origins
        self.is_valid = is_valid
        self.lookup = lookup
        self.student: Student | None = None
        self.sources: dict[int, SourcePlan] = {}
        self.eval_sources: dict[int, SourcePlan] = {}
        self.experts: dict[str, str | None] = {}
        self.problems: list[Problem] = []
        self.phase_teachers: dict[int, PhaseTeachers] = {}
        self.routed = False

    @property
    def teachers(self) -> dict[str, TeacherPlan]:
        """The teachers that resolved, in the recipe's order."""
        own = {} if self.student is None else self_plans(self.parts.teachers, self.student)
        known = {**self.with_cards.plans, **own}
        return {name: self._with_targets(known[name]) for name in self.parts.names if name in known}

    def _with_targets(self, teacher: TeacherPlan) -> TeacherPlan:
        """Add the path of the folder with the teacher's targets, if the recipe names one."""
        written = self.parts.teachers[teacher.name].targets
        if written is None:
            return teacher
        base = self.origins.place(("teachers", teacher.name, "targets")).base
        return teacher.model_copy(update={"targets": str(absolute(written, base))})

    def run(self) -> None:
        self._find_student()
        if not self.lookup.is_elsewhere:
            self.problems += checks.missing_quantizer(self.parts.teachers, self.origins)
        self._check_output()
        parts, origins = self.parts, self.origins
        domains = self.with_cards.domains
        all_cards = all(name in domains for name in parts.names)
        router = Router(parts.names, parts.teachers, domains, all_cards, origins)
        weights = {index: router.weights(source) for index, source in parts.prompts.items()}
        unrouted: list[Problem] = []
        if parts.names:  # without any, `teachers` itself is the mistake
            for index, source in parts.prompts.items():
                unrouted += router.problems(source, ("prompts", index), needed=parts.needs_teacher(index))
        self.problems += unrouted
        routed = {i: {name: w for name, w in own.items() if w} for i, own in weights.items()}
        self._resolve_sources(routed)
        teacher_weights = {name: ref.weight for name, ref in parts.teachers.items()}
        for index, phase in parts.phases.items():
            sources = {parts.source_names[i]: routed[i] for i in parts.sources_of(phase)}
            self.phase_teachers[index] = PhaseTeachers.of(phase, sources, teacher_weights)
        # These checks need all sources and all cards.
        self.routed = parts.all_prompts and all_cards and not unrouted and self.is_valid
        if self.routed:
            self.problems += route_problems(parts, self.phase_teachers, origins)
            self.problems += checks.unused_teachers(parts, weights, self.phase_teachers, origins)
        if parts.names:
            compared = {i: self._compared(i, own) for i, own in weights.items()} if self.routed else None
            self.experts, problems = checks.experts(parts, compared, origins)
            self.problems += problems
        self.problems += [*suite_problems(parts, origins), *best_problems(parts, origins)]
        if not self.lookup.is_elsewhere:
            self.problems += checks.report_problems(parts.report, origins)
        self._check_phases(any(problem.path.endswith(".domain") for problem in unrouted))

    def _compared(self, source: int, weights: Mapping[str, float]) -> Mapping[str, float]:
        """Return a source's teachers, or where it has none, those of single terms in its phases."""
        if weights:
            return weights
        phases = [i for i, p in self.parts.phases.items() if source in self.parts.sources_of(p)]
        terms = [own for i in phases for own in self.phase_teachers[i].of_terms.values()]
        return {name: weight for own in terms for name, weight in own.items()}

    def _find_student(self) -> None:
        if self.parts.student is None:
            return
        where: Keys = ("student", "model")
        written = self.parts.student
        self.problems += checks.student_problems(written, self.parts.rollout, self.origins)
        if not self.lookup.is_elsewhere:
            self.problems += checks.missing_backend(written, self.origins)
        base = self.origins.place(where).base
        folder = self.lookup.model("student", written.model, written.revision, base)
        if isinstance(folder, Missing):
            self.problems.append(self.origins.problem(where, folder.message, folder.remedy))
            return
        paths = {"model": str(folder)}
        if written.template is not None:
            where = ("student", "template")
            base = self.origins.place(where).base
            template = existing_file(written.template, base, "template")
            if isinstance(template, Missing) and self.lookup.is_elsewhere:
                template = absolute(written.template, base)
            if isinstance(template, Missing):
                self.problems.append(self.origins.problem(where, template.message, template.remedy))
                return
            paths["template"] = str(template)
        self.student = written.model_copy(update=paths)

    def _output(self) -> Path | None:
        if self.parts.output is None:
            return None
        return absolute(self.parts.output, self.origins.place(("output",)).base)

    def _check_output(self) -> None:
        path = self._output()
        obstacle = None if path is None else unwritable(path)
        if obstacle is None:
            return
        where, written, remedy = shown(obstacle), self.parts.output, "name another folder for the run"
        cause = f"no permission to write to {where}" if obstacle.is_dir() else f"{where} is not a folder"
        message = f"'{written}' cannot be written: {cause}"
        if obstacle == path and not obstacle.is_dir():
            message, remedy = f"'{written}' is a file", "name a folder for the run"
        self.problems.append(self.origins.problem(("output",), message, remedy))

    def _resolve_sources(self, routed: Mapping[int, Mapping[str, float]]) -> None:
        own_names = self.parts.source_names
        names = set(own_names.values())
        resolver = SourceResolver(self.origins, self.parts.allow_code, self.cards, self.lookup, names)
        for index, source in self.parts.prompts.items():
            if plan := resolver.resolve(source, ("prompts", index), routed[index], own_names[index]):
                self.sources[index] = plan
        for index, measured in self.parts.eval_sources.items():
            if plan := resolver.resolve(measured, ("evaluation", "prompts", index), {}):
                self.eval_sources[index] = plan
        self.problems += resolver.problems

    def _check_phases(self, domains_doubtful: bool) -> None:
        parts, origins = self.parts, self.origins
        of_phases = self.phase_teachers
        self.problems += checks.phase_problems(parts, origins)
        self.problems += teacher_problems(parts, origins)
        self.problems += [*name_problems(parts, origins), *draw_problems(parts, origins)]
        self.problems += objective_problems(parts, of_phases, origins)
        self.problems += bridge_problems(parts, of_phases, origins)
        if parts.all_prompts and not domains_doubtful:
            self.problems += checks.balance_problems(parts, origins)
        if parts.all_phases:
            self.problems += checks.schedule_problems(parts, origins)
            of_rules = list(rule_problems(parts, origins))
            if not of_rules and parts.names and len(parts.teachers) == len(parts.names):
                self.problems += idle_problems(parts, of_phases[0], origins)
            self.problems += of_rules

    def plan(self, recipe: Recipe, file: Path) -> Plan:
        """Create the plan of a recipe without problems."""
        output = self._output()
        assert self.student is not None
        assert output is not None
        evaluation = None
        if recipe.evaluation is not None:
            evaluation = EvaluationPlan(
                suites=suites(
                    recipe.evaluation,
                    recipe.rollout.max_new_tokens,
                    tuple(self.eval_sources.values()),
                    self.experts,
                ),
                static_merges=recipe.evaluation.static_merges,
                all_experts=recipe.evaluation.all_experts,
                batch_size=recipe.evaluation.batch_size,
                interim=recipe.evaluation.interim,
            )
        text_cache = absolute(recipe.text_cache, self.origins.place(("text_cache",)).base)
        resolved = {
            "recipe_file": os.path.abspath(file),
            "threads": recipe.threads or available_cores(),
            "student": self.student,
            "teachers": self.teachers,
            "sources": tuple(self.sources.values()),
            "rollout": self.parts.rollout,
            "evaluation": evaluation,
            "text_cache": str(text_cache),
            "output": str(output),
        }
        same = {name: value for name, value in recipe if name in Plan.model_fields}
        return Plan.model_validate(same | resolved)
