"""Collect what the alignment of gradients needs while an inspection opens its models one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from mergeopd.data.renderer import Renderer
from mergeopd.engine.rollouts import sampling, verify_responses
from mergeopd.engine.stages import Stages
from mergeopd.environment.episodes import Response
from mergeopd.errors import DataError
from mergeopd.inspection.gradients import (
    Gradients,
    ProbedResponse,
    ProbedSource,
    distillation_objective,
    measure,
)
from mergeopd.inspection.measure import STUDENT, StudentResponses
from mergeopd.inspection.nodes import Continuer
from mergeopd.inspection.sample import SampledSource
from mergeopd.loss.heads import Head
from mergeopd.recipe.inspection import GradientSettings
from mergeopd.reward.grading import Verifiers
from mergeopd.rollout.protocol import RolloutEngine
from mergeopd.teacher.protocol import TargetSpec, TeacherSession
from mergeopd.teacher.token_view import TokenView


@dataclass
class GradientProbe:
    """The student's responses of the sources that allow continuations, and their teachers' gradients.

    `responses` has the numbers of the responses by source. `notes` tell what is left out.
    """

    settings: GradientSettings
    student: StudentResponses
    sources: Mapping[str, SampledSource]
    responses: Mapping[str, Sequence[int]]
    probed: Mapping[str, ProbedSource]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        settings: GradientSettings,
        student: StudentResponses,
        sources: Mapping[str, SampledSource],
        members: Mapping[str, Sequence[int]],
        verifiers: Verifiers,
    ) -> GradientProbe:
        """Find the candidates at every token of the student's responses.

        `members` are each teacher's prompts. A source needs a verifier and responses of one turn that are
        sampled, not greedy.
        """
        reasons = {name: _obstacle(source, name in verifiers) for name, source in sources.items()}
        notes = [
            f"no alignment of gradients on {name}: {reason}" for name, reason in reasons.items() if reason
        ]
        responses: dict[str, list[int]] = {name: [] for name, reason in reasons.items() if not reason}
        for i, rollout in enumerate(student.rollouts):
            if rollout.prompt.source in responses and rollout.num_trained:
                responses[rollout.prompt.source].append(i)
        responses = {name: own for name, own in responses.items() if own}
        teachers = {
            prompt: frozenset(name for name, own in members.items() if prompt in own)
            for prompt in {student.graded[i].prompt for own in responses.values() for i in own}
        }
        probed = {
            name: ProbedSource(
                [_probed(student, i, teachers) for i in own],
                sampling(sources[name].rollout),
                distillation_objective(sources[name].phase),
                partial(_states, student, own),
                student.head,
                settings.candidates,
            )
            for name, own in responses.items()
        }
        return cls(settings, student, sources, responses, probed, notes)

    def add_teacher(
        self, name: str, session: TeacherSession, head: Head, view: TokenView, max_positions: int
    ) -> None:
        """Compare a teacher with the student's tokens at every token of every source.

        Sources whose prompts it cannot read are left out: they lack fields of its template, or exceed its
        context of `max_positions` tokens.
        """
        for source, own in self.responses.items():
            rollouts = [self.student.rollouts[i] for i in own]
            try:
                sequences = [view.read(rollout, None) for rollout in rollouts]
            except DataError:
                continue
            known = [sequence for sequence in sequences if sequence is not None]
            if max(sequence.num_tokens for sequence in known) > max_positions:
                continue
            states = session.score(known, TargetSpec("hidden"), self.student.max_tokens)
            masked = [view.masked(rollout) for rollout in rollouts]
            self.probed[source].add_teacher(name, states, head, masked)

    def finish(
        self, engine: RolloutEngine, renderer: Renderer, seed: int, verifiers: Verifiers, stages: Stages
    ) -> Gradients | None:
        """Let the student continue drawn nodes; None where no source allows it."""
        if not self.probed:
            return None
        names = {id(source): name for name, source in self.probed.items()}

        def continuer(source: ProbedSource) -> Continuer:
            return Continuer(
                engine, renderer, self.student.head, source.sampling, self.settings.continuations, seed
            )

        def grade(source: ProbedSource, responses: Sequence[Response]) -> list[float]:
            grades = verify_responses(
                verifiers,
                responses,
                names[id(source)],
                renderer.tokenizer,
                source.sampling.stop,
                stages,
                lambda _: stages.check(),
            )
            return [grade.reward or 0.0 for grade in grades]

        return measure(
            list(self.probed.values()),
            continuer,
            grade,
            num_nodes=self.settings.nodes,
            seed=seed,
            begin=lambda num: stages.begin("rollout", "continuations of the student", num, "responses"),
        )


def _states(student: StudentResponses, numbers: Sequence[int], members: Sequence[int]) -> Tensor:
    return student.cache.gather(STUDENT, [numbers[i] for i in members])


def _probed(student: StudentResponses, index: int, teachers: Mapping[int, frozenset[str]]) -> ProbedResponse:
    graded = student.graded[index]
    return ProbedResponse(
        graded.prompt,
        graded.response.prompt.domain,
        bool(graded.is_correct),
        teachers[graded.prompt],
        graded.response,
    )


def _obstacle(source: SampledSource, has_verifier: bool) -> str | None:
    """Return why the student's responses cannot be continued and graded; None if they can."""
    if source.plan.environment is not None:
        return "its responses have several turns, of which only the first could be continued"
    if not has_verifier:
        return "it has no verifier"
    if not source.rollout.temperature:
        return "its responses are greedy, which has no policy gradient"
    return None
