"""Runs the models of an inspection, one at a time: the student, every teacher, and the student again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mergeopd.data.renderer import Renderer
from mergeopd.engine.build import build_environments, build_verifiers
from mergeopd.engine.models import (
    Machine,
    build_teachers,
    build_views,
    divide_threads,
    engine_context,
    held_teachers,
)
from mergeopd.engine.stages import Stages
from mergeopd.errors import ServingError, TeacherError
from mergeopd.inspection.gradients import Gradients
from mergeopd.inspection.measure import (
    STUDENT,
    OnStudent,
    OwnResponses,
    StudentResponses,
    both_teachers,
    counted,
    own_sequence,
    rollouts_of,
    sampled_figures,
)
from mergeopd.inspection.probe import GradientProbe
from mergeopd.inspection.renderings import other_renderings
from mergeopd.inspection.sample import Responder, draw_sample, sampled_sources, with_verifiers
from mergeopd.inspection.signal import Measured, MeasuredRendering, Scored, token_mean
from mergeopd.preflight.inputs import Inputs
from mergeopd.recipe.inspection import InspectionSettings
from mergeopd.reporting.inspection import Conflict, Verdict
from mergeopd.rollout.local import LocalEngine
from mergeopd.rollout.protocol import ReplicaSource, RolloutEngine
from mergeopd.teacher.hidden_cache import HiddenCache
from mergeopd.teacher.local import LocalSession, TeacherSource, TeacherStore
from mergeopd.teacher.protocol import TargetSpec, Teacher, TeacherSession
from mergeopd.teacher.quantized import quantizations
from mergeopd.teacher.snapshots import StudentSnapshots
from mergeopd.teacher.token_view import SameTokens, TokenView
from mergeopd.types import Prompt


@dataclass(frozen=True)
class TeacherFindings:
    """What was measured of a teacher; `fault` is the verdict where that was not possible."""

    name: str
    members: Sequence[int]
    measured: Measured | None = None
    on_student: OnStudent | None = None
    own: OwnResponses | None = None
    fault: Verdict | None = None


@dataclass(frozen=True)
class Findings:
    """What was measured of all teachers, by name, and of every two that share prompts."""

    teachers: Mapping[str, TeacherFindings]
    conflicts: Sequence[Conflict]


@dataclass
class Inspector:
    """Measures teachers on the prompts of a sample. `members` are each teacher's prompts, by number."""

    inputs: Inputs
    settings: InspectionSettings
    machine: Machine
    stages: Stages
    prompts: Sequence[Prompt]
    members: Mapping[str, Sequence[int]]
    responder: Responder
    teachers: Mapping[str, Teacher]
    views: Mapping[str, TokenView]
    cache: HiddenCache
    with_gradients: bool
    who: str = "the student"
    student: StudentResponses = field(init=False)
    probe: GradientProbe | None = field(default=None, init=False)
    gradients: Gradients | None = field(default=None, init=False)

    def run(self) -> Findings:
        """Measure all teachers, by name."""
        self.respond()
        return self.compare()

    def respond(self) -> None:
        """Let the student respond to all prompts, and keep its hidden states."""
        with self.stages.clock.stage("rollout"), self.open_student() as session:
            self.student = self._respond(session)

    def with_weights(self, inputs: Inputs) -> Inspector:
        """Return an inspector of other weights of its teachers, on the same responses of the student."""
        teachers = _built(inputs, list(self.members), self.machine)
        other = replace(self, inputs=inputs, teachers=teachers)
        other.student = self.student
        return other

    def compare(self) -> Findings:
        """Measure all teachers on the student's responses."""
        if self.with_gradients:
            self.probe = self._gradient_probe()
        findings = {}
        for name in self.members:
            with self.stages.clock.stage("teachers"):
                findings[name] = self._teacher(name)
        with self.stages.clock.stage("rollout"), self.open_student() as session:
            if self.probe is not None:
                self.gradients = self._finish(self.probe, session)
            findings = {name: self._with_gaps(session, one) for name, one in findings.items()}
        with self.stages.clock.stage("teachers"):
            return Findings(findings, self._conflicts(findings))

    def _gradient_probe(self) -> GradientProbe:
        responder = self.responder
        return GradientProbe.of(
            self.settings.gradients, self.student, responder.sources, self.members, responder.verifiers
        )

    def _finish(self, probe: GradientProbe, session: LocalSession) -> Gradients | None:
        """Let the student continue its responses after forced tokens."""
        return probe.finish(
            session.generator(),
            self.inputs.student,
            self.inputs.plan.seed,
            self.responder.verifiers,
            self.stages,
        )

    @contextmanager
    def open_student(self) -> Iterator[LocalSession]:
        plan = self.inputs.plan.student
        source = TeacherSource(Path(plan.model), plan.dtype, self.inputs.vocab_size)
        store = TeacherStore({self.who: source}, self.machine.device)
        with store.open(self.who, partial(self._engine, self.inputs.student)) as session:
            yield session

    def _engine(self, renderer: Renderer, source: ReplicaSource) -> RolloutEngine:
        context = engine_context(renderer, self.inputs, self.machine)
        return LocalEngine(source, context, self.inputs.plan.rollout.batch_size)

    def _respond(self, session: LocalSession) -> StudentResponses:
        everything = range(len(self.prompts))
        engine, max_tokens = session.generator(), self.inputs.plan.student.micro_batch_tokens
        graded = self.responder.respond(engine, self.inputs.student, everything, "rollout", self.who)
        student = StudentResponses(graded, rollouts_of(graded), session.head, self.cache, max_tokens)
        sequences = [own_sequence(one.response) for one in graded]
        figures = sampled_figures(session, sequences, max_tokens)
        none = np.zeros(0)
        for i in range(len(graded)):
            logprobs, entropies = figures.get(i, (none, none))
            student.logprobs.append(logprobs)
            student.entropies.append(entropies)
        known = [i for i, sequence in enumerate(sequences) if sequence.num_trained]
        on_progress = self.stages.begin("teachers", self.who, len(known), "responses")
        for done, (position, rows) in enumerate(
            session.score([sequences[i] for i in known], TargetSpec("hidden"), max_tokens), start=1
        ):
            self.cache.put(STUDENT, known[position], rows)
            on_progress(done)
        return student

    def _teacher(self, name: str) -> TeacherFindings:
        members = self.members[name]
        if name not in self.teachers:
            fault = Verdict("unknown", "is behind an API, which an inspection does not ask")
            return TeacherFindings(name, members, fault=fault)
        if not members:
            remedy = "name it in the `teachers` of a source or a phase"
            fault = Verdict("unknown", "has no prompts in any phase", remedy=remedy)
            return TeacherFindings(name, members, fault=fault)
        try:
            with self.teachers[name].open() as session:
                return self._measure(name, session)
        except (TeacherError, ServingError) as error:
            return TeacherFindings(name, members, fault=Verdict("wrong_teacher", f"cannot be used: {error}"))

    def _measure(self, name: str, session: TeacherSession) -> TeacherFindings:
        members, view = self.members[name], self.views[name]
        teacher, own = self.teachers[name], None
        notes = [
            f"its weights are {one.format}, {one.text}" for one in quantizations({name: teacher}).values()
        ]
        if teacher.capabilities.can_generate:
            graded = self.responder.respond(
                session.generator(), self.inputs.teachers[name], members, "text", f"{name} generates"
            )
            own = OwnResponses.of(graded, session, self.student.max_tokens)
        else:
            notes.append("it cannot generate here, so its own responses were not measured")
        on_student = OnStudent(
            self.student, self.settings.top_k, self.stages, self._shown(members), self._kept(name)
        )
        responses = self.student.of(members)
        scored = self.compare_with(name, session, on_student)
        has_distributions = self.has_distributions(name)
        renderings = self._renderings(name, session) if has_distributions else []
        if has_distributions and self.probe is not None:
            context = self.inputs.teachers[name].max_positions
            self.probe.add_teacher(name, session, teacher.head(None), view, context)
        if not has_distributions:
            notes.append(
                "it has another tokenizer, so only log-probabilities of whole spans were compared"
                if view.bridge_kind is not None
                else "its servers return no distributions, so only sampled tokens were compared"
            )
        measured = Measured(
            k=min(self.settings.top_k, self.inputs.vocab_size),
            num_ids=self.inputs.vocab_size if has_distributions else self.inputs.teachers[name].vocab_size,
            on_student=scored,
            on_own=[] if own is None else own.scored(),
            graded_S=self.student.counted(members),
            graded_T=[] if own is None else counted(own.graded),
            foreign_ends=self._foreign_ends(view, responses, own),
            renderings=renderings,
            notes=tuple(notes),
        )
        return TeacherFindings(name, members, measured, on_student, own)

    def compare_with(self, name: str, session: TeacherSession, on_student: OnStudent) -> list[Scored]:
        """Compare a teacher with the student on the student's responses to the teacher's prompts."""
        view, responses = self.views[name], self.student.of(self.members[name])
        if self.has_distributions(name):
            return on_student.distributions(name, session, self.teachers[name].head(None), view, responses)
        return on_student.spans(name, session, view, responses)

    def has_distributions(self, name: str) -> bool:
        """Whether a teacher's distributions over the student's tokens are known."""
        if name not in self.teachers or self.views[name].bridge_kind is not None:
            return False
        return "hidden" in self.teachers[name].capabilities.can_provide

    def _renderings(self, name: str, session: TeacherSession) -> list[MeasuredRendering]:
        """Measure the teacher with other renderings of its prompts."""
        members, own, student = self.members[name], self.inputs.teachers[name], self.inputs.student
        if not self.teachers[name].capabilities.can_generate:
            return []
        measured = []
        prompts = [self.prompts[i] for i in members]
        others = other_renderings(self.inputs.plan.teachers[name], own, student, prompts, self.inputs.now)
        for what, renderer in others.items():
            graded = self.responder.respond(
                session.generator(), renderer, members, "text", f"{name} with {what}"
            )
            compared = OnStudent(self.student, self.settings.top_k, self.stages)
            scored = compared.distributions(
                f"{name} with {what}",
                session,
                self.teachers[name].head(None),
                SameTokens(renderer, student),
                self.student.of(members),
            )
            measured.append(MeasuredRendering(what, scored, counted(graded)))
        return measured

    def _with_gaps(self, session: LocalSession, one: TeacherFindings) -> TeacherFindings:
        """Add the student's log-probabilities of the teacher's own responses."""
        if one.measured is None or one.own is None:
            return one
        self.stages.begin(
            "teachers", f"the student on responses of {one.name}", len(one.own.graded), "responses"
        )
        gaps = one.own.gaps(session, self.inputs.student, self.views[one.name], self.student.max_tokens)
        return replace(one, measured=replace(one.measured, on_own=[*one.measured.on_own, *gaps]))

    def _foreign_ends(
        self, view: TokenView, responses: Sequence[int], own: OwnResponses | None
    ) -> list[tuple[int, bool]]:
        """Return whether each ended response's end token is one that the teacher does not use.

        Such a token is not in its template, or not at the end of its own responses.
        """
        used = frozenset[int]() if own is None or not isinstance(view, SameTokens) else own.end_ids()
        ends = []
        for i in responses:
            rollout = self.student.rollouts[i]
            if rollout.finish == "eos":
                last = rollout.num_trained - 1
                unused = bool(used) and int(rollout.response_ids[-1]) not in used
                ends.append((self.student.graded[i].prompt, unused or last in view.masked(rollout)))
        return ends

    def _shown(self, members: Sequence[int]) -> frozenset[int]:
        """Choose responses to show: the first to each of some prompts, of all domains in turn."""
        first = {self.student.graded[i].prompt: i for i in reversed(self.student.of(members))}
        by_domain: dict[str, list[int]] = {}
        for prompt in members:
            if prompt in first:
                by_domain.setdefault(self.prompts[prompt].domain, []).append(first[prompt])
        rows = max(map(len, by_domain.values()), default=0)
        in_turn = [own[row] for row in range(rows) for own in by_domain.values() if row < len(own)]
        return frozenset(in_turn[: self.settings.responses])

    def _kept(self, name: str) -> frozenset[int]:
        """Return the responses that another teacher can be compared on with this one."""
        others = [other for other in self.members if other != name and self.has_distributions(other)]
        shared = {prompt for other in others for prompt in self.members[other]}
        return frozenset(self.student.of(set(self.members[name]) & shared))

    def _conflicts(self, findings: Mapping[str, TeacherFindings]) -> list[Conflict]:
        """Compare the gradients of every two teachers of the same prompts."""
        names = [name for name in findings if self.has_distributions(name) and not findings[name].fault]
        conflicts = []
        for first, second in combinations(names, 2):
            shared = self.student.of(set(self.members[first]) & set(self.members[second]))
            if shared:
                views = self.views[first], self.views[second]
                heads = self.teachers[first].head(None), self.teachers[second].head(None)
                weights = [(self.weight(first, i), self.weight(second, i)) for i in shared]
                scored = both_teachers(self.student, (first, second), heads, views, shared, weights)
                num_tokens = sum(len(one.positions) for one in scored)
                cosine, floor = (token_mean(scored, figure) for figure in ("cosine", "floor"))
                conflicts.append(Conflict(first, second, num_tokens, cosine, floor))
        return conflicts

    def weight(self, name: str, response: int) -> float:
        """Return a teacher's weight at a prompt: the largest that it has in a term."""
        prompt = self.prompts[self.student.graded[response].prompt]
        of_terms = (weights.get(name, 0.0) for weights in prompt.term_teachers.values())
        return max(prompt.teachers.get(name, 0.0), *of_terms, 0.0)


@contextmanager
def open_inspector(
    inputs: Inputs,
    names: Sequence[str],
    num_prompts: int | None,
    machine: Machine,
    stages: Stages,
    *,
    with_gradients: bool,
) -> Iterator[Inspector]:
    """Compose the inspection of these teachers; its memory and processes end with the context."""
    divide_threads(inputs.plan, machine)
    inputs = _with_student_snapshots(inputs)
    plan, settings = inputs.plan, inputs.plan.inspect
    sources = sampled_sources(plan, names)
    prompts = draw_sample(inputs, sources, names, num_prompts or settings.prompts)
    plans = with_verifiers(inputs, sources)
    teachers = _built(inputs, names, machine)
    views = build_views(inputs, machine, stages.note)
    with ExitStack() as opened:
        environments = build_environments(plans, plan, machine.ranks)
        opened.callback(environments.close)
        verifiers = opened.enter_context(build_verifiers(plans, inputs, machine))
        folder = Path(opened.enter_context(TemporaryDirectory()))
        budget = int(plan.memory.hidden_states_gib * 2**30)
        yield Inspector(
            inputs,
            settings,
            machine,
            stages,
            prompts,
            {name: [i for i, p in enumerate(prompts) if name in (*p.scorers, p.writer)] for name in names},
            Responder(prompts, sources, settings.samples, verifiers, environments, stages),
            teachers,
            views,
            opened.enter_context(HiddenCache(budget, folder, machine.device)),
            with_gradients,
        )


def _built(inputs: Inputs, names: Sequence[str], machine: Machine) -> dict[str, Teacher]:
    snapshots = StudentSnapshots((), _nothing, _nothing)
    skip = inputs.plan.teachers.keys() - set(names)
    held = held_teachers(inputs, machine, skip=skip)
    return build_teachers(inputs, machine, snapshots, skip=skip, held=held)


def _with_student_snapshots(inputs: Inputs) -> Inputs:
    """Replace teachers that follow the student by the student, which they are before the first update."""
    plan = inputs.plan
    teachers = {
        name: teacher if teacher.snapshot_rule is None else teacher.model_copy(update={"student": "start"})
        for name, teacher in plan.teachers.items()
    }
    return replace(inputs, plan=plan.model_copy(update={"teachers": teachers}))


def _nothing() -> Iterator[Any]:
    return iter(())
