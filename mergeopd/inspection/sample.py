"""The sample of an inspection: prompts of every source, and graded responses of one model to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mergeopd.batch.advantages import RIGHT
from mergeopd.data.draw import PromptDraw
from mergeopd.data.renderer import Renderer
from mergeopd.engine.rollouts import environment_grade, sampling, verify_responses
from mergeopd.engine.stages import Stages
from mergeopd.environment.episodes import Environments, Response
from mergeopd.preflight.inputs import Inputs
from mergeopd.recipe.plan import Plan, SourcePlan
from mergeopd.recipe.rollout import RolloutSettings
from mergeopd.recipe.training import Phase, never_student
from mergeopd.recipe.verifiers import columns_of, needs_reference
from mergeopd.reporting.events import StageName
from mergeopd.reward.grading import Verifiers
from mergeopd.rollout.protocol import Completion, GenerationRequest, RolloutEngine
from mergeopd.types import Prompt

LEAST_PER_TEACHER = 8


@dataclass(frozen=True, slots=True)
class SampledSource:
    """A source in an inspection: the phase whose teachers and rollout settings are inspected."""

    plan: SourcePlan
    phase: Phase
    rollout: RolloutSettings


@dataclass(frozen=True, slots=True)
class GradedResponse:
    """A model's response to prompt number `prompt` of the sample; `reward` is None without a verifier."""

    prompt: int
    sample: int
    response: Response
    reward: float | None

    @property
    def is_correct(self) -> bool | None:
        return None if self.reward is None else self.reward >= RIGHT


def sampled_sources(plan: Plan, teachers: Collection[str]) -> dict[str, SampledSource]:
    """Return the sources with prompts that one of these teachers scores or writes for, by name.

    The phase is the first that draws from the source with one of the teachers, preferably one in which the
    student generates.
    """
    by_name: dict[str, SampledSource] = {}
    for phase in sorted(plan.phases, key=never_student):
        own = plan.teachers_of(phase)
        for source in plan.sources_of(phase):
            named = {*own.scoring([source.name]), *own.routed[source.name]}
            if source.name not in by_name and source.text_field is None and named & set(teachers):
                by_name[source.name] = SampledSource(source, phase, plan.rollout_of(phase))
    return {source.name: by_name[source.name] for source in plan.sources if source.name in by_name}


def with_verifiers(inputs: Inputs, sources: Mapping[str, SampledSource]) -> list[SourcePlan]:
    """Return the sources' plans; one without a verifier takes that of its domain's evaluation, if it can."""
    suites = {} if inputs.plan.evaluation is None else {s.domain: s for s in inputs.plan.evaluation.sources}
    plans = []
    for name, source in sources.items():
        plan, other = source.plan, suites.get(source.plan.domain)
        gives = plan.verifier is not None or plan.environment is not None
        if not gives and other is not None and _can_grade(other, inputs.prompts[name]):
            plan = plan.model_copy(update={"verifier": other.verifier})
        plans.append(plan)
    return plans


def _can_grade(other: SourcePlan, prompts: Sequence[Prompt]) -> bool:
    """Whether the verifier of an evaluation source can grade responses to other prompts of its domain."""
    if other.verifier is None or other.reward_model is not None or columns_of(other.verifier) is not None:
        return False
    return not needs_reference(other.verifier) or all(prompt.reference is not None for prompt in prompts)


def draw_sample(
    inputs: Inputs, sources: Mapping[str, SampledSource], teachers: Collection[str], num_prompts: int
) -> tuple[Prompt, ...]:
    """Draw prompts of all sources in equal parts, with their teachers of the inspected phase.

    They are the first that a run with these sources draws of each. A teacher with fewer than
    `LEAST_PER_TEACHER` gets more of its sources.
    """
    plan = inputs.plan
    routed = {
        name: [plan.teachers_of(source.phase).route(prompt) for prompt in inputs.prompts[name]]
        for name, source in sources.items()
    }
    names_of = {name: {*prompts[0].scorers, prompts[0].writer} for name, prompts in routed.items()}
    counts = shared_out({name: len(prompts) for name, prompts in routed.items()}, num_prompts)
    for teacher in teachers:
        own = {name: len(routed[name]) for name, names in names_of.items() if teacher in names}
        if sum(counts[name] for name in own) < LEAST_PER_TEACHER:
            least = shared_out(own, LEAST_PER_TEACHER)
            counts |= {name: max(counts[name], num) for name, num in least.items()}
    return tuple(
        prompt
        for name, num in counts.items()
        for _, prompt in PromptDraw({name: routed[name]}, {name: 1.0}, plan.seed).draw(0, num)
    )


def shared_out(available: Mapping[str, int], total: int) -> dict[str, int]:
    """Share `total` out in equal parts, of which none exceeds what is available, and none is 0."""
    counts = Counter(dict.fromkeys(available, 0))
    left = min(max(total, len(available)), sum(available.values()))
    while left:
        for name in [name for name in available if counts[name] < available[name]][:left]:
            counts[name] += 1
            left -= 1
    return dict(counts)


@dataclass(frozen=True)
class Responder:
    """Lets models respond to the sample's prompts, and grades the responses."""

    prompts: Sequence[Prompt]
    sources: Mapping[str, SampledSource]
    num_samples: int
    verifiers: Verifiers
    environments: Environments
    stages: Stages

    def respond(
        self,
        engine: RolloutEngine,
        renderer: Renderer,
        members: Sequence[int],
        stage: StageName,
        who: str,
    ) -> list[GradedResponse]:
        """Generate and grade the responses of one model to these prompts of the sample, by prompt."""
        graded = []
        for source in dict.fromkeys(self.prompts[i].source for i in members):
            own = [i for i in members if self.prompts[i].source == source]
            graded += self._respond(engine, renderer, own, self.sources[source], stage, who)
        return graded

    def _respond(
        self,
        engine: RolloutEngine,
        renderer: Renderer,
        members: Sequence[int],
        source: SampledSource,
        stage: StageName,
        who: str,
    ) -> list[GradedResponse]:
        name, stages = source.plan.name, self.stages
        asked = [(i, sample) for i in members for sample in range(self.num_samples)]

        def turn(requests: Sequence[GenerationRequest], which: str) -> list[Completion]:
            on_progress = stages.begin(stage, f"{who} on {name}{which}", len(requests), "responses")
            return engine.submit(requests, sampling(source.rollout)).wait(on_progress)

        prompts = [(self.prompts[i], sample) for i, sample in asked]
        responses = self.environments.play(prompts, renderer, turn, stages.check)
        if name in self.verifiers:
            grades = verify_responses(
                self.verifiers,
                responses,
                name,
                renderer.tokenizer,
                source.rollout.stop,
                stages,
                lambda _: stages.check(),
            )
        else:
            grades = [environment_grade(response) for response in responses]
        return [
            GradedResponse(i, sample, response, grade.reward)
            for (i, sample), response, grade in zip(asked, responses, grades, strict=True)
        ]
