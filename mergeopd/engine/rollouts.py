"""The responses of a round: the student's own, teachers' and the dataset's, and their rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mergeopd.data.renderer import Dialect
from mergeopd.data.trajectory import ready_answer
from mergeopd.distributed.ranks import Ranks, spread
from mergeopd.engine.progress import Task
from mergeopd.engine.stages import Stages
from mergeopd.recipe.training import LocalRollout
from mergeopd.reward.verifiers import Verify
from mergeopd.rollout.protocol import GenerationRequest, RolloutEngine
from mergeopd.types import Rollout, Sampling


class StudentRollouts:
    """Generates the student's responses, `samples_per_prompt` for each prompt."""

    def __init__(
        self, engine: RolloutEngine, settings: LocalRollout, student: Dialect, stages: Stages
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._student = student
        self._stages = stages

    def generate(self, tasks: Sequence[Task]) -> list[Rollout]:
        """Responses to the tasks that the student answers, in their order. Collective."""
        num_samples = self._settings.samples_per_prompt
        prompts = [t.prompt for t in tasks if t.origin == "student" for _ in range(num_samples)]
        requests = [
            GenerationRequest(
                task.prompt.key, task.occurrence * num_samples + sample, self._student.render(task.prompt)
            )
            for task in tasks
            if task.origin == "student"
            for sample in range(num_samples)
        ]
        if not requests:
            return []
        on_progress = self._stages.begin("rollout", "the student", len(requests), "responses")
        completions = self._engine.submit(requests, sampling(self._settings)).wait(on_progress)
        return [
            Rollout(
                prompt=prompt,
                sample=request.sample,
                prompt_ids=request.prompt_ids,
                response_ids=completion.response_ids,
                origin="student",
                finish=completion.finish,
                logprobs_behaviour=completion.logprobs,
                policy_version=completion.policy_version,
            )
            for prompt, request, completion in zip(prompts, requests, completions, strict=True)
        ]


def sampling(settings: LocalRollout) -> Sampling:
    """How a recipe's responses are sampled."""
    return Sampling(settings.temperature, settings.top_p, settings.max_new_tokens, settings.stop)


def dataset_rollout(task: Task, student: Dialect) -> Rollout:
    """The dataset's own response, in the student's ids."""
    answer = ready_answer(task.prompt, student)
    return Rollout(
        prompt=task.prompt,
        sample=task.occurrence,
        prompt_ids=student.render(task.prompt),
        response_ids=answer.ids,
        origin="dataset",
        finish="eos",
        trained=answer.trained,
    )


class Rewards:
    """Grades responses with the verifiers of their sources."""

    def __init__(
        self,
        verifiers: Mapping[str, Verify],
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str],
        ranks: Ranks,
    ) -> None:
        self._verifiers = verifiers
        self._decode = decode
        self._stop = stop
        self._ranks = ranks

    def of(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """The reward of every response that the student generated; None without a verifier, and for others.

        Every process grades its share. Collective.
        """
        return spread(self._ranks, rollouts, lambda own: [self._reward(rollout) for rollout in own])

    def _reward(self, rollout: Rollout) -> float | None:
        verify = self._verifiers.get(rollout.prompt.source) if rollout.origin == "student" else None
        if verify is None:
            return None
        return verify(response_text(rollout.response_ids, self._decode, self._stop), rollout.prompt.reference)


def response_text(
    response_ids: Sequence[int], decode: Callable[[Sequence[int]], str], stop: Sequence[str]
) -> str:
    """A response as a person reads it: special tokens removed, cut at the first stop text."""
    text = decode(response_ids)
    cuts = [text.find(s) for s in stop if s in text]
    return text[: min(cuts)] if cuts else text
