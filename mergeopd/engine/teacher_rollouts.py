"""Text that the student does not generate: the dataset's, and teachers' responses.

Teachers generate before a phase, once per prompt and sample, and their responses are cached for later runs. A
phase may keep only those that the verifiers of their sources accept.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from mergeopd.batch.advantages import RIGHT
from mergeopd.data.draw import PhasedDraw
from mergeopd.data.renderer import Renderer
from mergeopd.data.trajectory import dataset_response
from mergeopd.engine.progress import Progress, Task, draw_tasks
from mergeopd.engine.rollouts import Rewards, dataset_rollout, sampling
from mergeopd.engine.stages import Stages
from mergeopd.environment.episodes import Environments, Response
from mergeopd.errors import DataError, TeacherError
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.rollout import RolloutSettings
from mergeopd.recipe.routing import writer_of
from mergeopd.recipe.training import Phase, reads_teachers
from mergeopd.rollout.protocol import Completion, GenerationRequest
from mergeopd.storage import run_layout
from mergeopd.storage.completion_cache import CompletionCache, Origin
from mergeopd.storage.teacher_text import GradedText, KeptShare, kept_shares, read_graded, write_graded
from mergeopd.teacher.api import ApiTeacher
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
    api_teachers: Mapping[str, ApiTeacher]
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
            if missing and teacher in self.api_teachers:
                self._ask(self.api_teachers[teacher], missing, own)
            elif missing:
                self._provide(teacher, missing, own)

    def of(self, task: Task, settings: RolloutSettings) -> list[Rollout]:
        """Return the prepared responses to a task, in the student's ids.

        Responses with tools that the student's template cannot render are left out with a note; replies of an
        API that cannot be used were counted in one.
        """
        name = writer_of(task.prompt)
        rollouts = []
        for sample in range(settings.samples_per_prompt):
            response = self._responses[name, task.prompt.key, sample, sampling(settings)]
            if not len(response.completion.response_ids):
                continue
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

    def _ask(self, teacher: ApiTeacher, prompts: Mapping[tuple[str, int], Prompt], sampled: Sampling) -> None:
        """Let an API write the responses, whose replies it keeps itself."""

        def turn(requests: Sequence[GenerationRequest], which: str) -> list[Completion]:
            on_progress: Callable[[int], None] = self.stages.check
            if num := teacher.num_missing(requests, sampled):
                on_progress = self.stages.begin("text", f"{teacher.name} generates{which}", num, "responses")
            size = self.stages.ranks.size
            return teacher.submit(requests, sampled).wait(lambda done: on_progress(-(-done // size)))

        asked = [(prompt, sample) for (_, sample), prompt in prompts.items()]
        responses = self.environments.play(asked, self.renderers[teacher.name], turn, self.stages.check)
        if not any(len(response.completion.response_ids) for response in responses):
            raise TeacherError(
                f"none of the {len(responses)} responses of teacher '{teacher.name}' can be used; if they "
                "are cut in their reasoning, raise `api.max_tokens` in its card"
            )
        for (key, sample), response in zip(prompts, responses, strict=True):
            self._responses[teacher.name, key, sample, sampled] = response

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


@dataclass(frozen=True)
class KeptText:
    """The responses of teachers that a phase keeps.

    `samples` are their numbers, by teacher and prompt; `replacements` the tasks that take the place of those
    without any, by position in the phase; `shares` what was kept, by teacher and domain.
    """

    samples: Mapping[tuple[str, str], Collection[int]]
    replacements: Mapping[int, Task]
    shares: Mapping[str, Mapping[str, float]]

    def tasks(self, drawn: Sequence[Task], first: int) -> list[Task]:
        """Return the tasks of a round that begins at position `first` of the phase."""
        return [self.replacements.get(first + i, task) for i, task in enumerate(drawn)]

    def of(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Return the kept ones of the responses to a prompt."""
        return [r for r in rollouts if r.sample in self.samples[writer_of(r.prompt), r.prompt.key]]


@dataclass(frozen=True)
class TextFilter:
    """Grades teachers' responses before a phase, and selects those that it keeps.

    Rewards are kept in the run folder, so that a resumed run selects the same, even where a verifier has a
    time limit.
    """

    plan: Plan
    responses: TeacherRolloutCache
    rewards: Rewards
    stages: Stages

    def select(self, phase: Phase, tasks: Sequence[Task]) -> KeptText:
        """Select from the prepared responses to all tasks of a phase. Collective.

        Raises TeacherError if a domain has none left.
        """
        settings = self.plan.rollout_of(phase)
        rollouts = {
            (writer_of(task.prompt), task.prompt.key): self.responses.of(task, settings)
            for task in tasks
            if task.origin == "teacher"
        }
        rows = self._graded(phase, [(name, r) for (name, _), own in rollouts.items() for r in own])
        samples: dict[tuple[str, str], list[int]] = {names: [] for names in rollouts}
        for row in rows:
            if row.kept:
                samples[row.teacher, row.key].append(row.sample)
        shares: dict[str, dict[str, float]] = {}
        for each in kept_shares(rows):
            shares.setdefault(each.teacher, {})[each.domain] = each.kept_fraction
            self.stages.note(_kept_note(each))
        replacements = self.stages.ranks.run_on_first(lambda: replace_unsolved(phase, tasks, samples))
        return KeptText(samples, replacements, shares)

    def _graded(self, phase: Phase, rollouts: Sequence[tuple[str, Rollout]]) -> list[GradedText]:
        """Return a row per response, with the reward of an earlier start of the run, or a new one."""
        path = Path(self.plan.output) / run_layout.TEACHER_TEXT
        least = RIGHT if isinstance(phase.keep, str) else phase.keep
        verifiers = {source.name: str(source.verifier) for source in self.plan.sources}
        earlier = self.stages.ranks.run_on_first(lambda: read_graded(path))
        known = {(row.teacher, row.key, row.sample, row.digest): row.reward for row in earlier}
        names = []
        for teacher, rollout in rollouts:
            prompt = rollout.prompt
            content = (rollout.response_ids.tolist(), prompt.reference, verifiers[prompt.source])
            digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
            names.append((teacher, prompt.key, rollout.sample, digest))
        new = [index for index, name in enumerate(names) if name not in known]
        grades = self.rewards.of([rollouts[i][1] for i in new], self.plan.rollout_of(phase).stop, "teacher")
        known |= {names[index]: grade.reward for index, grade in zip(new, grades, strict=True)}
        rows = []
        for (_, rollout), name in zip(rollouts, names, strict=True):
            teacher, key, sample, digest = name
            truncated, reward = rollout.finish == "length", known[name]
            # A truncated response is not correct, whatever its reward.
            is_kept = reward is not None and reward >= least and not truncated
            place = (phase.name, teacher, rollout.prompt.domain, key, sample, digest)
            rows.append(GradedText(*place, reward, truncated, is_kept))
        others = [row for row in earlier if row.phase != phase.name]
        if [*others, *rows] != list(earlier):
            self.stages.ranks.run_on_first(lambda: write_graded(path, [*others, *rows]))
        return rows


@dataclass
class FixedText:
    """The responses of a run's phases that the student does not generate.

    They and the tasks of every round are a function of the plan alone.
    """

    plan: Plan
    draw: PhasedDraw
    responses: TeacherRolloutCache
    rewards: Rewards
    stages: Stages
    _prepared_phase: str = field(default="", init=False)
    _kept: KeptText | None = field(default=None, init=False)

    @property
    def kept_shares(self) -> Mapping[str, Mapping[str, float]]:
        """The share of teachers' responses that the phase keeps; empty if it keeps all."""
        return {} if self._kept is None else self._kept.shares

    def tasks(self, phase: Phase, updates_done: int, progress: Progress) -> list[Task]:
        """Return the tasks of a round; the first of a phase generates its teachers' responses. Collective."""
        if phase.name != self._prepared_phase:
            self._prepare(phase, updates_done, progress)
        tasks = draw_tasks(self.draw, self.plan, phase, progress, updates_done)
        return tasks if self._kept is None else self._kept.tasks(tasks, first=phase.num_drawn(updates_done))

    def of(self, tasks: Sequence[Task], settings: RolloutSettings) -> list[Rollout]:
        """Return the responses to tasks of a prepared phase, in their order; the student's are left out."""
        return self._of(tasks, settings, self._kept)

    def of_phases(self, names: Collection[str]) -> Iterator[tuple[Phase, list[Rollout]]]:
        """Yield the responses of every phase of these names, once for every prompt and origin. Collective.

        They are all of a teacher's responses, even if the phase keeps only some.
        """
        drawn = 0
        for phase in self.plan.phases:
            settings = self.plan.rollout_of(phase)
            if phase.name in names:
                drawn_tasks = self._drawn(phase, 0, Progress(drawn=drawn))
                tasks = list({(task.prompt.key, task.origin): task for task in drawn_tasks}.values())
                self.responses.prepare(tasks, settings)
                yield phase, self._of(tasks, settings, None)
            drawn += phase.prompts_per_round * (phase.updates // phase.updates_per_round)

    def _of(self, tasks: Sequence[Task], settings: RolloutSettings, kept: KeptText | None) -> list[Rollout]:
        rollouts = []
        for task in tasks:
            if task.origin == "teacher":
                responses = self.responses.of(task, settings)
                rollouts += responses if kept is None else kept.of(responses)
            elif task.origin == "dataset":
                rollouts.append(dataset_rollout(task, self.responses.student))
        return rollouts

    def _prepare(self, phase: Phase, updates_done: int, progress: Progress) -> None:
        """Generate all teacher responses that the rest of this phase needs.

        A phase that keeps some of them needs those of its first rounds, too: what is kept takes the place of
        what is not, in the whole phase.
        """
        if phase.keep != "all":
            progress = replace(progress, drawn=progress.drawn - phase.num_drawn(updates_done))
            updates_done = 0
        self._kept = None
        if reads_teachers(phase):
            tasks = self._drawn(phase, updates_done, progress)
            with self.stages.clock.stage("text"):
                self.responses.prepare(tasks, self.plan.rollout_of(phase))
                if phase.keep != "all":
                    select = TextFilter(self.plan, self.responses, self.rewards, self.stages).select
                    self._kept = select(phase, tasks)
        self._prepared_phase = phase.name

    def _drawn(self, phase: Phase, updates_done: int, progress: Progress) -> list[Task]:
        """Draw the tasks of the rest of a phase."""
        tasks: list[Task] = []
        while updates_done < phase.updates:
            tasks += draw_tasks(self.draw, self.plan, phase, progress, updates_done)
            progress = replace(progress, drawn=progress.drawn + phase.prompts_per_round)
            updates_done += phase.updates_per_round
        return tasks


def replace_unsolved(
    phase: Phase, tasks: Sequence[Task], samples: Mapping[tuple[str, str], Collection[int]]
) -> dict[int, Task]:
    """Give the place of every prompt without a kept response to those with one in its domain, in turn.

    Raises TeacherError if a domain has none.
    """

    def is_solved(task: Task) -> bool:
        return bool(samples[writer_of(task.prompt), task.prompt.key])

    solved: dict[str, dict[str, Task]] = {}
    unsolved: list[tuple[int, Task]] = []
    for position, task in enumerate(tasks):
        if task.origin == "teacher" and is_solved(task):
            solved.setdefault(task.prompt.domain, {}).setdefault(task.prompt.key, task)
        elif task.origin == "teacher":
            unsolved.append((position, task))
    replacements: dict[int, Task] = {}
    used: Counter[str] = Counter()
    for position, task in unsolved:
        domain = task.prompt.domain
        others = list(solved.get(domain, {}).values())
        if not others:
            raise TeacherError(
                f"phase '{phase.name}' keeps no response of '{writer_of(task.prompt)}' in domain "
                f"'{domain}'; look at their rewards in {run_layout.TEACHER_TEXT} of the run folder, "
                "check the verifier and `rollout.max_new_tokens`, raise `rollout.samples_per_prompt`, or "
                "remove `keep`"
            )
        replacements[position] = others[used[domain] % len(others)]
        used[domain] += 1
    return replacements


def _kept_note(each: KeptShare) -> str:
    truncated = f", {each.num_truncated} are truncated" if each.num_truncated else ""
    replaced = ""
    if each.num_without and each.num_kept:
        replaced = (
            f"; {each.num_without} of {each.num_prompts} prompts have none, and others of the domain take "
            "their places"
        )
    return (
        f"phase '{each.phase}' keeps {each.num_kept} of {each.num_responses} responses "
        f"({each.kept_fraction:.0%}) of {each.teacher} in domain {each.domain}{truncated}{replaced}"
    )
