"""Teacher responses, generated before a phase once per prompt and sample, and cached for later runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from mergeopd.data.renderer import Renderer
from mergeopd.data.trajectory import dataset_response
from mergeopd.engine.progress import Task
from mergeopd.engine.rollouts import sampling
from mergeopd.engine.stages import Stages
from mergeopd.environment.episodes import Environments, Response
from mergeopd.errors import DataError
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.routing import writer_of
from mergeopd.recipe.training import RolloutSettings
from mergeopd.rollout.protocol import Completion, GenerationRequest
from mergeopd.storage.completion_cache import CompletionCache, Origin
from mergeopd.teacher.protocol import Teacher, TeacherSession
from mergeopd.teacher.token_view import TokenView
from mergeopd.types import Prompt, Rollout, Sampling, token_flags, token_ids


@dataclass(frozen=True)
class TeacherRolloutCache:
    """Teachers' responses, by teacher, prompt, sample and sampling settings."""

    plan: Plan
    student: Renderer
    renderers: Mapping[str, Renderer]
    teachers: Mapping[str, Teacher]
    views: Mapping[str, TokenView]
    environments: Environments
    stages: Stages
    _responses: dict[tuple[str, str, int, Sampling], Response] = field(default_factory=dict, init=False)

    def prepare(self, tasks: Sequence[Task], settings: RolloutSettings) -> None:
        """Generate the missing responses to these tasks; each teacher is opened at most once."""
        needed: dict[str, dict[tuple[str, int], Prompt]] = {}
        for task in tasks:
            if task.origin == "teacher":
                for sample in range(settings.samples_per_prompt):
                    needed.setdefault(writer_of(task.prompt), {})[task.prompt.key, sample] = task.prompt
        own = sampling(settings)
        for teacher, prompts in needed.items():
            missing = {k: p for k, p in prompts.items() if (teacher, *k, own) not in self._responses}
            if missing:
                self._provide(teacher, missing, own)

    def of(self, task: Task, settings: RolloutSettings) -> list[Rollout]:
        """Return the prepared responses to a task, in the student's ids.

        Responses with tools that the student's template cannot render are left out with a note.
        """
        name = writer_of(task.prompt)
        rollouts = []
        for sample in range(settings.samples_per_prompt):
            response = self._responses[name, task.prompt.key, sample, sampling(settings)]
            try:
                rollouts.append(self._rollout(task.prompt, name, response, sample))
            except DataError as error:
                self.stages.note(f"a response of {name} to {task.prompt.key} is left out: {error}")
        return rollouts

    def _rollout(self, prompt: Prompt, name: str, response: Response, sample: int) -> Rollout:
        episode = response.episode
        if episode is not None:  # with what the environment has added
            prompt = replace(prompt, messages=response.prompt.messages, tools=response.prompt.tools)
        prompt_ids = self.student.render(prompt)
        ids, finish = self.views[name].student_ids(response.completion, prompt)
        if episode is None or self._has_students_turns(name):
            return Rollout(
                prompt, sample, prompt_ids, ids, "teacher", finish, trained=response.trained, episode=episode
            )
        turns = episode.messages
        while turns and turns[-1].role != "assistant":  # a truncated turn was to follow
            turns = turns[:-1]
        if not turns:
            return Rollout(prompt, sample, prompt_ids, ids, "teacher", finish, episode=episode)
        written = dataset_response(replace(prompt, response=turns), self.student)
        return Rollout(
            prompt,
            sample,
            prompt_ids,
            token_ids(written.ids),
            "teacher",
            finish,
            trained=None if written.trained is None else token_flags(written.trained),
            episode=episode,
        )

    def _has_students_turns(self, name: str) -> bool:
        """Whether a teacher writes turns and replies with the student's tokens and template."""
        own, student = self.renderers[name].template, self.student.template
        same = (own.source, own.arguments) == (student.source, student.arguments)
        return same and self.views[name].bridge_kind is None

    def _provide(self, name: str, prompts: Mapping[tuple[str, int], Prompt], sampled: Sampling) -> None:
        renderer = self.renderers[name]
        origin = Origin(
            name=name,
            fingerprint=self.teachers[name].fingerprint,
            dtype=self.plan.teachers[name].dtype,
            eos_ids=renderer.eos_ids,
            vocab_size=renderer.tokenizer.vocab_size,
            sampling=sampled,
            seed=self.plan.seed,
        )
        cache = CompletionCache(Path(self.plan.text_cache), self.stages.ranks, self.stages.note)
        with ExitStack() as opened:
            # Opened once, for the first turn with a missing response.
            @functools.cache
            def session() -> TeacherSession:
                return opened.enter_context(self.teachers[name].open())

            def turn(requests: Sequence[GenerationRequest], which: str) -> list[Completion]:
                generate = partial(self._generate, session, f"{name} generates{which}", sampled)
                return cache.complete(origin, requests, generate)

            asked = [(prompt, sample) for (_, sample), prompt in prompts.items()]
            responses = self.environments.play(asked, renderer, turn, self.stages.check)
        for (key, sample), response in zip(prompts, responses, strict=True):
            self._responses[name, key, sample, sampled] = response

    def _generate(
        self,
        session: Callable[[], TeacherSession],
        detail: str,
        sampled: Sampling,
        requests: Sequence[GenerationRequest],
    ) -> Iterator[tuple[Sequence[GenerationRequest], list[Completion]]]:
        """Yield responses in batches, one of every process at a time. Collective.

        In a resumed run, whole batches at the end are missing, so the rest forms the same batches.
        """
        size = self.plan.rollout.batch_size * self.stages.ranks.size
        in_order = sorted(requests, key=lambda request: len(request.prompt_ids))
        on_progress = self.stages.begin("text", detail, len(requests), "responses")
        engine = session().generator()
        for start in range(0, len(in_order), size):
            batch = in_order[start : start + size]
            yield batch, engine.submit(batch, sampled).wait(lambda _: None)
            done = -(-(start + len(batch)) // self.stages.ranks.size)
            self.stages.ranks.run_and_gather(lambda done=done: on_progress(done))  # type: ignore[misc]
