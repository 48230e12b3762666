"""Answers for a round's prompts: the student's own, a teacher's, or the dataset's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergeopd.engine.build import Parts
from mergeopd.engine.dialect import Dialect
from mergeopd.engine.state import Progress, off_policy_origin, on_policy_fraction
from mergeopd.recipe.schema import Phase
from mergeopd.report.events import Reporter, StageProgress, StageStarted
from mergeopd.rollout.keyed import stream_key, uniforms
from mergeopd.rollout.local import Completion, Request, generate
from mergeopd.storage.folders import write_atomic
from mergeopd.types import Origin, Prompt, Rollout, Sampling


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt of a round: how often it came before, and who answers it this time."""

    prompt: Prompt
    occurrence: int
    origin: Origin


def plan_round(parts: Parts, phase: Phase, progress: Progress, updates_done: int) -> list[Task]:
    """The prompts of the next round and who answers each; a function of seed and cursor alone."""
    plan = parts.plan
    drawn = parts.prompt_draw.draw(progress.drawn, phase.prompts_per_round)
    fraction = on_policy_fraction(phase, updates_done)
    other = off_policy_origin(phase)
    keys = [stream_key(plan.seed, "who answers", progress.drawn + i) for i in range(len(drawn))]
    chances = uniforms(keys, 1)[:, 0]
    return [
        Task(prompt, occurrence, "student" if other is None or chance < fraction else other)
        for (occurrence, prompt), chance in zip(drawn, chances.tolist(), strict=True)
    ]


def author(prompt: Prompt) -> str:
    """The teacher that writes for a prompt: the heaviest, the first by name among equals."""
    return min(prompt.teachers, key=lambda name: (-prompt.teachers[name], name))


def write_student(parts: Parts, tasks: Sequence[Task], version: int, reporter: Reporter) -> list[Rollout]:
    """On-policy answers, `samples_per_prompt` each, for the tasks that the student answers."""
    rollout = parts.plan.rollout
    mine = [task for task in tasks if task.origin == "student"]
    requests = [
        Request(
            task.prompt.key,
            task.occurrence * rollout.samples_per_prompt + sample,
            parts.inputs.student.render(task.prompt),
        )
        for task in mine
        for sample in range(rollout.samples_per_prompt)
    ]
    if not requests:
        return []
    reporter.emit(StageStarted("rollout", "the student writes", len(requests), "answers"))
    completions = generate(
        parts.student_writer(),
        requests,
        Sampling(rollout.temperature, rollout.top_p, rollout.max_new_tokens, rollout.stop),
        seed=parts.plan.seed,
        batch_size=rollout.batch_size,
        progress=lambda done: reporter.emit(StageProgress(done)),
    )
    prompts = [task.prompt for task in mine for _ in range(rollout.samples_per_prompt)]
    return [
        Rollout(
            prompt=prompt,
            sample=request.sample,
            prompt_ids=request.prompt_ids,
            response_ids=completion.response_ids,
            origin="student",
            finish=completion.finish,
            logprobs_behaviour=completion.logprobs,
            policy_version=version,
        )
        for prompt, request, completion in zip(prompts, requests, completions, strict=True)
    ]


def dataset_rollout(task: Task, student: Dialect) -> Rollout:
    """The dataset's own answer, closed with the student's end-of-text token."""
    ids = student.tokenizer.encode(task.prompt.response or "")
    return Rollout(
        prompt=task.prompt,
        sample=task.occurrence,
        prompt_ids=student.render(task.prompt),
        response_ids=(*ids, student.end_id),
        origin="dataset",
        finish="eos",
    )


class TeacherTexts:
    """Answers that teachers write before a phase, once per prompt and sample, kept in the run folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._texts: dict[tuple[str, str, int], Completion] = {}

    def prepare(self, parts: Parts, tasks: Sequence[Task], reporter: Reporter) -> None:
        """Have every teacher write what these tasks will ask for; a teacher is loaded at most once."""
        wanted: dict[str, dict[tuple[str, int], Prompt]] = {}
        for task in tasks:
            if task.origin == "teacher":
                for sample in range(parts.plan.rollout.samples_per_prompt):
                    wanted.setdefault(author(task.prompt), {})[task.prompt.key, sample] = task.prompt
        for teacher, prompts in wanted.items():
            self._load(teacher)
            missing = {k: p for k, p in prompts.items() if (teacher, *k) not in self._texts}
            if missing:
                self._write(parts, teacher, missing, reporter)

    def rollouts(self, task: Task, num_samples: int, student: Dialect) -> list[Rollout]:
        """The prepared answers to a task; the teacher's stop token becomes the student's."""
        name = author(task.prompt)
        texts = [self._texts[name, task.prompt.key, sample] for sample in range(num_samples)]
        return [
            Rollout(
                prompt=task.prompt,
                sample=sample,
                prompt_ids=student.render(task.prompt),
                response_ids=_closed(text, student),
                origin="teacher",
                finish=text.finish,
            )
            for sample, text in enumerate(texts)
        ]

    def _write(
        self, parts: Parts, name: str, prompts: Mapping[tuple[str, int], Prompt], reporter: Reporter
    ) -> None:
        rollout, dialect = parts.plan.rollout, parts.inputs.teachers[name]
        requests = [Request(key, sample, dialect.render(prompt)) for (key, sample), prompt in prompts.items()]
        reporter.emit(StageStarted("text", f"{name} writes", len(requests), "answers"))
        with parts.store.open(name) as teacher:
            completions = generate(
                parts.teacher_writer(teacher),
                requests,
                Sampling(rollout.temperature, rollout.top_p, rollout.max_new_tokens, rollout.stop),
                seed=parts.plan.seed,
                batch_size=rollout.batch_size,
                progress=lambda done: reporter.emit(StageProgress(done)),
            )
        for request, completion in zip(requests, completions, strict=True):
            self._texts[name, request.key, request.sample] = completion
        self._save(name)

    def _path(self, teacher: str) -> Path:
        return self._folder / f"{teacher}.jsonl"

    def _save(self, teacher: str) -> None:
        lines = [
            json.dumps({"key": key, "sample": sample, "ids": text.response_ids, "finish": text.finish})
            for (name, key, sample), text in self._texts.items()
            if name == teacher
        ]
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path(teacher), "\n".join(lines) + "\n")

    def _load(self, teacher: str) -> None:
        if not self._path(teacher).is_file():
            return
        for line in self._path(teacher).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            self._texts[teacher, row["key"], row["sample"]] = Completion(tuple(row["ids"]), (), row["finish"])


def _closed(text: Completion, student: Dialect) -> tuple[int, ...]:
    if text.finish != "eos" or text.response_ids[-1] in student.eos_ids:
        return text.response_ids
    return (*text.response_ids[:-1], student.end_id)


def answer_text(
    rollout_ids: Sequence[int], decode: Callable[[Sequence[int]], str], stop: Sequence[str]
) -> str:
    """The answer as a person reads it: special tokens removed, cut at the first stop text."""
    text = decode(rollout_ids)
    cuts = [text.find(s) for s in stop if s in text]
    return text[: min(cuts)] if cuts else text
