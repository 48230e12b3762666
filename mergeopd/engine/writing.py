"""Answers for a round's prompts: the student's own and the dataset's. Those of teachers: `texts`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mergeopd.engine.build import Parts
from mergeopd.engine.dialect import Dialect
from mergeopd.engine.ready_answers import ready_answer
from mergeopd.engine.tasks import Task
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.ranks import Ranks, spread
from mergeopd.report.events import Reporter, StageProgress, StageStarted
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


def progress(reporter: Reporter, total: int, ranks: Ranks) -> Callable[[int], None]:
    """Tells how much of `total` is done, when this process has done so much of its share."""
    return lambda done: reporter.emit(StageProgress(min(total, done * ranks.size)))


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


def answer_text(response_ids: Sequence[int], tokenizer: Tokenizer, stop: Sequence[str]) -> str:
    """The answer as a person reads it: cut at the first stop text, special tokens removed.

    Stop texts may hold special tokens, so they are looked for before those are removed.
    """
    whole = tokenizer.decode(response_ids, skip_special_tokens=False)
    cuts = [found for text in stop if (found := whole.find(text)) >= 0]
    if not cuts:
        return tokenizer.decode(response_ids)
    # A stop text mostly ends the answer, so the last whole token before it is near the end.
    num, before = len(response_ids), whole
    while len(before) > min(cuts):
        num -= 1
        before = tokenizer.decode(response_ids[:num], skip_special_tokens=False)
    return tokenizer.decode(response_ids[:num]) + whole[len(before) : min(cuts)]
