"""Teacher responses, generated before a phase once per prompt and sample, and cached for later runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mergeopd.data.renderer import Renderer
from mergeopd.engine.progress import Task
from mergeopd.engine.rollouts import sampling
from mergeopd.engine.stages import Stages
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.routing import writer_of
from mergeopd.recipe.training import RolloutSettings
from mergeopd.rollout.protocol import Completion, GenerationRequest
from mergeopd.storage.completion_cache import CompletionCache, Origin
from mergeopd.teacher.protocol import Teacher
from mergeopd.teacher.token_view import TokenView
from mergeopd.types import Prompt, Rollout, Sampling


@dataclass(frozen=True)
class TeacherRolloutCache:
    """Teachers' responses, by teacher, prompt, sample and sampling settings."""

    plan: Plan
    student: Renderer
    renderers: Mapping[str, Renderer]
    teachers: Mapping[str, Teacher]
    views: Mapping[str, TokenView]
    stages: Stages
    _completions: dict[tuple[str, str, int, Sampling], Completion] = field(default_factory=dict, init=False)

    def prepare(self, tasks: Sequence[Task], settings: RolloutSettings) -> None:
        """Generate the missing responses to these tasks; each teacher is opened at most once."""
        needed: dict[str, dict[tuple[str, int], Prompt]] = {}
        for task in tasks:
            if task.origin == "teacher":
                for sample in range(settings.samples_per_prompt):
                    needed.setdefault(writer_of(task.prompt), {})[task.prompt.key, sample] = task.prompt
        own = sampling(settings)
        for teacher, prompts in needed.items():
            missing = {k: p for k, p in prompts.items() if (teacher, *k, own) not in self._completions}
            if missing:
                self._provide(teacher, missing, own)

    def of(self, task: Task, settings: RolloutSettings) -> list[Rollout]:
        """Return the prepared responses to a task, in the student's ids."""
        name, prompt = writer_of(task.prompt), task.prompt
        rollouts = []
        for sample in range(settings.samples_per_prompt):
            completion = self._completions[name, prompt.key, sample, sampling(settings)]
            ids, finish = self.views[name].student_ids(completion, prompt)
            rollout = Rollout(prompt, sample, self.student.render(prompt), ids, "teacher", finish)
            rollouts.append(rollout)
        return rollouts

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
        requests = [
            GenerationRequest(key, sample, renderer.render(p)) for (key, sample), p in prompts.items()
        ]
        cache = CompletionCache(Path(self.plan.text_cache), self.stages.ranks, self.stages.note)
        completions = cache.complete(origin, requests, partial(self._generate, name, sampled))
        for request, completion in zip(requests, completions, strict=True):
            self._completions[name, request.key, request.sample, sampled] = completion

    def _generate(
        self, name: str, sampled: Sampling, requests: Sequence[GenerationRequest]
    ) -> Iterator[tuple[Sequence[GenerationRequest], list[Completion]]]:
        """Yield responses in batches, one of every process at a time. Collective.

        In a resumed run, whole batches at the end are missing, so the rest forms the same batches.
        """
        size = self.plan.rollout.batch_size * self.stages.ranks.size
        in_order = sorted(requests, key=lambda request: len(request.prompt_ids))
        on_progress = self.stages.begin("text", f"{name} generates", len(requests), "responses")
        with self.teachers[name].open() as session:
            engine = session.generator()
            for start in range(0, len(in_order), size):
                batch = in_order[start : start + size]
                yield batch, engine.submit(batch, sampled).wait(lambda _: None)
                done = -(-(start + len(batch)) // self.stages.ranks.size)
                self.stages.ranks.run_and_gather(lambda done=done: on_progress(done))  # type: ignore[misc]
