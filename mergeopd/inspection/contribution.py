"""Measures the base and the merged student of a run with the same prompts, random numbers and teachers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from mergeopd.engine.evaluate import shown_text
from mergeopd.engine.models import Machine
from mergeopd.engine.stages import Stages
from mergeopd.errors import ServingError, TeacherError
from mergeopd.inspection.changes import Side
from mergeopd.inspection.finished_run import FinishedRun
from mergeopd.inspection.inspector import Inspector, open_inspector
from mergeopd.inspection.measure import OnStudent, OwnResponses, counted
from mergeopd.inspection.signal import Graded, Scored
from mergeopd.storage.responses import EvaluatedResponse
from mergeopd.teacher.hidden_cache import HiddenCache
from mergeopd.teacher.protocol import TeacherSession


@dataclass(frozen=True)
class MeasuredTeacher:
    """What was measured of a teacher beside both students; `fault` is the reason why it could not be."""

    members: Sequence[int]
    base: Side | None = None
    merged: Side | None = None
    graded: Sequence[Graded] = ()
    notes: tuple[str, ...] = ()
    fault: str | None = None


@dataclass(frozen=True)
class _OnBoth:
    """A teacher's figures on both students' responses, and its own responses."""

    base: Sequence[Scored]
    merged: Sequence[Scored]
    own: OwnResponses | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class BothStudents:
    """Inspectors of the base and of the merged student, on one sample.

    `followers` are the teachers that were updated from the student during the run.
    """

    base: Inspector
    merged: Inspector
    followers: frozenset[str]

    def run(self) -> dict[str, MeasuredTeacher]:
        """Measure all teachers, by name. Every model is opened at most twice, one at a time."""
        self.base.respond()
        self.merged.respond()
        on_both: dict[str, _OnBoth] = {}
        measured: dict[str, MeasuredTeacher] = {}
        for name, members in self.base.members.items():
            measured[name] = MeasuredTeacher(members)
            try:
                with self.base.stages.clock.stage("teachers"), self.base.teachers[name].open() as session:
                    on_both[name] = self._teacher(name, session)
            except (TeacherError, ServingError) as error:
                measured[name] = MeasuredTeacher(members, fault=f"cannot be used: {error}")
        gaps = [self._gaps(student, on_both) for student in (self.merged, self.base)]
        return measured | {
            name: self._measured(name, one, gaps[1].get(name, []), gaps[0].get(name, []))
            for name, one in on_both.items()
        }

    def _teacher(self, name: str, session: TeacherSession) -> _OnBoth:
        inspector, view = self.base, self.base.views[name]
        own, notes = None, []
        if name in self.followers:
            notes.append("it followed the student; here it is the base, which it was at the start")
        if inspector.teachers[name].capabilities.can_generate:
            graded = inspector.responder.respond(
                session.generator(),
                inspector.inputs.teachers[name],
                inspector.members[name],
                "text",
                f"{name} generates",
            )
            own = OwnResponses.of(graded, session, inspector.student.max_tokens)
        else:
            notes.append("it cannot generate here, so its own responses were not measured")
        if not inspector.has_distributions(name):
            notes.append(
                "it has another tokenizer, so only log-probabilities of whole spans were compared"
                if view.bridge_kind is not None
                else "its servers return no distributions, so only sampled tokens were compared"
            )
        scored = [
            one.compare_with(name, session, OnStudent(one.student, one.settings.top_k, one.stages))
            for one in (self.base, self.merged)
        ]
        return _OnBoth(scored[0], scored[1], own, tuple(notes))

    def _gaps(self, student: Inspector, on_both: Mapping[str, _OnBoth]) -> dict[str, list[Scored]]:
        """Score the teachers' responses by one of the students."""
        known = {name: one.own for name, one in on_both.items() if one.own is not None}
        if not known:
            return {}
        gaps = {}
        with student.stages.clock.stage("teachers"), student.open_student() as session:
            for name, own in known.items():
                who = f"{student.who} on responses of {name}"
                student.stages.begin("teachers", who, len(own.graded), "responses")
                renderer, max_tokens = student.inputs.student, student.student.max_tokens
                gaps[name] = list(own.gaps(session, renderer, student.views[name], max_tokens))
        return gaps

    def _measured(
        self, name: str, one: _OnBoth, base: Sequence[Scored], merged: Sequence[Scored]
    ) -> MeasuredTeacher:
        members = self.base.members[name]
        return MeasuredTeacher(
            members,
            Side(one.base, base, self.base.student.counted(members)),
            Side(one.merged, merged, self.merged.student.counted(members)),
            [] if one.own is None else counted(one.own.graded),
            one.notes,
        )


@contextmanager
def open_students(
    run: FinishedRun, num_prompts: int | None, machine: Machine, stages: Stages
) -> Iterator[BothStudents]:
    """Compose the measurement of a run; its memory and processes end with the context."""
    inputs = run.inputs
    names = [name for name in inputs.plan.teachers if name not in run.faults]
    exported = inputs.plan.student.model_copy(update={"model": str(run.export.absolute())})
    with ExitStack() as opened:
        base = opened.enter_context(
            open_inspector(inputs, names, num_prompts, machine, stages, with_gradients=False)
        )
        base = replace(base, who="the base")
        folder = Path(opened.enter_context(TemporaryDirectory()))
        merged = replace(
            base,
            inputs=replace(base.inputs, plan=base.inputs.plan.model_copy(update={"student": exported})),
            cache=opened.enter_context(
                HiddenCache(int(inputs.plan.memory.hidden_states_gib * 2**30), folder, machine.device)
            ),
            who="the merged student",
        )
        followers = (name for name in names if inputs.plan.teachers[name].snapshot_rule is not None)
        yield BothStudents(base, merged, frozenset(followers))


def sampled_responses(inspector: Inspector) -> list[EvaluatedResponse]:
    """Return a student's responses to the sample as an evaluation has them."""
    student, inputs = inspector.inputs.student, inspector.inputs
    rows = []
    for graded in inspector.student.graded:
        prompt, completion = inspector.prompts[graded.prompt], graded.response.completion
        rows.append(
            EvaluatedResponse(
                domain=prompt.domain,
                source=prompt.source,
                key=prompt.key,
                sample=graded.sample,
                prompt=student.text(graded.response.prompt),
                reference=prompt.reference,
                response=shown_text(graded.response, student.tokenizer, inputs.plan.rollout.stop),
                reward=graded.reward,
                failure=None,
                finish=completion.finish,
                num_tokens=len(completion.response_ids),
            )
        )
    return rows
