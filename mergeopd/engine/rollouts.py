"""Answers for a round's prompts: the student's own and the dataset's. Those of teachers: `texts`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mergeopd.data.renderer import Dialect
from mergeopd.data.trajectory import ready_answer
from mergeopd.distributed.ranks import spread
from mergeopd.engine.build import Parts
from mergeopd.engine.tasks import Task
from mergeopd.report.events import Reporter, StageStarted, progress
from mergeopd.rollout.local import Request, generate
from mergeopd.types import Rollout, Sampling


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
    with parts.student_writer() as writer:
        completions = spread(
            parts.ranks,
            requests,
            lambda own: generate(
                writer,
                own,
                Sampling(rollout.temperature, rollout.top_p, rollout.max_new_tokens, rollout.stop),
                seed=parts.plan.seed,
                batch_size=rollout.batch_size,
                progress=progress(reporter, len(requests), parts.ranks),
            ),
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
    """The dataset's own answer, in the student's ids."""
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


def answer_text(
    rollout_ids: Sequence[int], decode: Callable[[Sequence[int]], str], stop: Sequence[str]
) -> str:
    """The answer as a person reads it: special tokens removed, cut at the first stop text."""
    text = decode(rollout_ids)
    cuts = [text.find(s) for s in stop if s in text]
    return text[: min(cuts)] if cuts else text
