"""The responses of a round: the student's own, teachers' and the dataset's, and their rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mergeopd.data.renderer import Renderer
from mergeopd.data.trajectory import dataset_response
from mergeopd.distributed.communicator import scatter_gather
from mergeopd.engine.progress import Task
from mergeopd.engine.stages import Stages
from mergeopd.environment.episodes import Environments, Response
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.recipe.rollout import RolloutSettings
from mergeopd.reporting.events import StageName
from mergeopd.reward.grading import Submission, Verifiers
from mergeopd.reward.pool import Grade, failures_note
from mergeopd.rollout.protocol import Completion, GenerationRequest, RolloutEngine
from mergeopd.types import Finish, Message, Origin, Rollout, Sampling, TokenIds, token_flags, token_ids


@dataclass(frozen=True)
class StudentRollouts:
    """Generates the student's responses.

    No phase has more than `max_samples` responses to a prompt: a prompt's occurrences are as many random
    streams apart.
    """

    engine: RolloutEngine
    max_samples: int
    student: Renderer
    environments: Environments
    stages: Stages

    def generate(self, tasks: Sequence[Task], settings: RolloutSettings) -> list[Rollout]:
        """Generate responses to the student's tasks, `samples_per_prompt` for each, in order. Collective."""
        prompts = [
            (task.prompt, task.occurrence * self.max_samples + sample)
            for task in tasks
            if task.origin == "student"
            for sample in range(settings.samples_per_prompt)
        ]
        if not prompts:
            return []

        def turn(requests: Sequence[GenerationRequest], which: str) -> list[Completion]:
            on_progress = self.stages.begin("rollout", f"the student{which}", len(requests), "responses")
            return self.engine.submit(requests, sampling(settings)).wait(on_progress)

        responses = self.environments.play(prompts, self.student, turn, self.stages.check)
        return [
            student_rollout(response, sample)
            for response, (_, sample) in zip(responses, prompts, strict=True)
        ]


def student_rollout(response: Response, sample: int) -> Rollout:
    """Return the student's response as a rollout."""
    completion = response.completion
    return Rollout(
        prompt=response.prompt,
        sample=sample,
        prompt_ids=response.prompt_ids,
        response_ids=completion.response_ids,
        origin="student",
        finish=completion.finish,
        logprobs_behaviour=completion.logprobs if len(completion.logprobs) else None,
        policy_version=completion.policy_version,
        trained=response.trained,
        episode=response.episode,
        routes=completion.routes,
    )


def sampling(settings: RolloutSettings) -> Sampling:
    return Sampling(settings.temperature, settings.top_p, settings.max_new_tokens, settings.stop)


def dataset_rollout(task: Task, student: Renderer) -> Rollout:
    """Encode the dataset's response, or a document, in the student's ids."""
    if (document := task.prompt.document) is not None:
        return Rollout(task.prompt, task.occurrence, document.context_ids, document.ids, "dataset", "eos")
    response = dataset_response(task.prompt, student)
    return Rollout(
        prompt=task.prompt,
        sample=task.occurrence,
        prompt_ids=student.render(task.prompt),
        response_ids=token_ids(response.ids),
        origin="dataset",
        finish="eos",
        trained=None if response.trained is None else token_flags(response.trained),
    )


@dataclass(frozen=True)
class Rewards:
    """Grades responses with the verifiers of their sources.

    If a verifier fails, the response has no reward; failures are counted, and reported once per source.
    """

    verifiers: Verifiers
    tokenizer: Tokenizer
    stages: Stages
    _noted_sources: set[str] = field(default_factory=set, init=False)

    def of(self, rollouts: Sequence[Rollout], stop: Sequence[str], origin: Origin = "student") -> list[Grade]:
        """Grade the responses of one origin; others, and those without a verifier, have no reward.

        `stop` are the strings that end a response. Every process grades its share. Collective; raises
        AbandonRound when a stop was requested.
        """
        graded = {
            i: r
            for i, r in enumerate(rollouts)
            if r.origin == origin and r.prompt.source in self.verifiers and _failure(r) is None
        }
        stage: StageName = "rollout" if origin == "student" else "text"
        num_slow = sum(self.verifiers.is_slow(rollout.prompt.source) for rollout in graded.values())
        on_progress: Callable[[int], None] = (
            self.stages.begin(stage, "verifying", num_slow, "responses") if num_slow else lambda _: None
        )

        def verify(own: Sequence[Rollout]) -> list[Grade]:
            submissions = [submission(r, r.finish, self.tokenizer, stop) for r in own]
            return self.verifiers.verify(submissions, on_progress)

        by_index = dict(
            zip(graded, scatter_gather(self.stages.ranks, list(graded.values()), verify), strict=True)
        )
        grades = [
            by_index[i] if i in by_index else environment_grade(rollout) for i, rollout in enumerate(rollouts)
        ]
        self._note_failures(rollouts, grades)
        return grades

    def close(self) -> None:
        self.verifiers.close()

    def _note_failures(self, rollouts: Sequence[Rollout], grades: Sequence[Grade]) -> None:
        """Report the first failures of each source's verifier; metrics count all."""
        failures: dict[str, list[str]] = {}
        for rollout, grade in zip(rollouts, grades, strict=True):
            if grade.failure is not None and rollout.prompt.source not in self._noted_sources:
                failures.setdefault(rollout.prompt.source, []).append(grade.failure)
        for source, reasons in failures.items():
            self._noted_sources.add(source)
            note = failures_note(source, reasons)
            self.stages.note(f"{note}; such responses have no reward, and metrics count them")


def environment_grade(rollout: Rollout | Response) -> Grade:
    """Return the reward of a response without a verifier: that of its environment, if it gives one."""
    episode = rollout.episode
    return Grade(None) if episode is None else Grade(episode.reward, _failure(rollout))


def _failure(rollout: Rollout | Response) -> str | None:
    return None if rollout.episode is None else rollout.episode.failure


def verify_responses(
    verifiers: Verifiers,
    responses: Sequence[Response],
    source: str,
    tokenizer: Tokenizer,
    stop: Sequence[str],
    stages: Stages,
    on_progress: Callable[[int], None],
) -> list[Grade]:
    """Grade responses to prompts of one source; each process grades its share. Collective."""
    submissions = [submission(one, one.completion.finish, tokenizer, stop) for one in responses]
    verified: list[Grade] = scatter_gather(
        stages.ranks,
        submissions,
        # Report progress again, so that a request to stop is handled while verifiers are slow.
        lambda own: verifiers.verify(own, lambda _: on_progress(len(own))),
    )
    grades = [
        environment_grade(one) if one.episode is not None and one.episode.failure else grade
        for one, grade in zip(responses, verified, strict=True)
    ]
    failures = [grade.failure for grade in grades if grade.failure is not None]
    if failures:
        stages.note(f"{failures_note(source, failures)}; they count as incorrect")
    return grades


def submission(
    one: Rollout | Response, finish: Finish, tokenizer: Tokenizer, stop: Sequence[str]
) -> Submission:
    """Decode a response for the verifier of its prompt."""
    prompt, text = one.prompt, response_text(one.final_ids, tokenizer, stop)
    turns = () if one.episode is None else one.episode.messages
    if not turns or turns[-1].role != "assistant":  # the turns lack a last one that was truncated
        turns = (*turns, Message("assistant", text))
    return Submission(
        source=prompt.source,
        response=text,
        reference=prompt.reference,
        truncated=finish == "length",
        messages=(*prompt.messages, *turns),
        tools=prompt.tools,
    )


def response_text(response_ids: TokenIds, tokenizer: Tokenizer, stop: Sequence[str]) -> str:
    """Return a response's text, truncated at the first stop text, without special tokens.

    Stop texts may contain special tokens, so they are searched before those are removed.
    """
    ids = response_ids.tolist()
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    cuts = [start for text in stop if (start := whole.find(text)) >= 0]
    if not cuts:
        return tokenizer.decode(ids)
    # A stop text mostly ends the response, so the last whole token before it is near the end.
    num, before = len(ids), whole
    while len(before) > min(cuts):
        num -= 1
        before = tokenizer.decode(ids[:num], skip_special_tokens=False)
    return tokenizer.decode(ids[:num]) + whole[len(before) : min(cuts)]
