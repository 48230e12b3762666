"""The teachers' turns of a round, and the verifiers'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergeopd.engine.batch import Before
from mergeopd.engine.build import Parts
from mergeopd.engine.observing import Kept, Observed, reduced
from mergeopd.engine.outcomes import Outcomes
from mergeopd.engine.schedule import by_teacher
from mergeopd.engine.writing import answer_text
from mergeopd.loss.heads import Head
from mergeopd.recipe.training import Phase
from mergeopd.report.events import Reporter, StageProgress, StageStarted
from mergeopd.teacher.cache import HiddenCache
from mergeopd.teacher.store import LoadedTeacher
from mergeopd.types import Rollout


@dataclass(frozen=True)
class ScoredRound:
    """A round before its updates.

    `verdicts` belong to the rollouts, `outcomes` says what they mean, `observed` is what the teachers left,
    and `before` the policy before the first update, where that is needed.
    """

    phase: Phase
    index: int
    rollouts: Sequence[Rollout]
    verdicts: Sequence[float | None]
    observed: Observed
    outcomes: Outcomes
    before: Mapping[int, Before]


def score(
    parts: Parts,
    rollouts: Sequence[Rollout],
    round_index: int,
    cache: HiddenCache,
    what: Kept,
    reporter: Reporter,
) -> None:
    """Put what is to be kept of every trained token under each of its teachers into `cache`.

    Each teacher is loaded once, sees the prompt through its own template, and gets the response's ids as
    they were written. While it scores, the next teacher's files are read ahead. A teacher of which no hidden
    states are kept has its head in memory during its turn, else only during the updates.
    """
    turns = by_teacher(rollouts, tuple(sorted(parts.plan.teachers)), round_index)
    following = [turn.teacher for turn in turns[1:]] + [None]
    for turn, next_teacher in zip(turns, following, strict=True):
        dialect = parts.inputs.teachers[turn.teacher]
        scored = [i for i in turn.rollouts if rollouts[i].num_trained]
        reporter.emit(StageStarted("teachers", turn.teacher, len(scored), "answers"))
        prompts = [dialect.render(rollouts[i].prompt) for i in scored]
        responses = [rollouts[i].response_ids for i in scored]
        with parts.store.open(turn.teacher) as teacher:
            if next_teacher is not None:
                parts.store.read_ahead(next_teacher)
            score_canary(parts, teacher)
            trained = [rollouts[i].trained for i in scored]
            hidden = teacher.hidden(prompts, responses, parts.plan.student.micro_batch_tokens, trained)
            if what.kind != "hidden":
                answers = [rollouts[i].trained_ids for i in scored]
                hidden = reduced(hidden, answers, _true_head(parts, turn.teacher), what)
            for done, (position, rows) in enumerate(hidden, start=1):
                cache.put(turn.teacher, scored[position], rows)
                reporter.emit(StageProgress(done))
        parts.store.heads(())


def _true_head(parts: Parts, teacher: str) -> Head:
    """A teacher's head. Raises TeacherError where it shows that the teacher is not what its card says."""
    head = parts.store.heads([teacher])[teacher]
    parts.canaries.verify(teacher, head)
    return head


def score_canary(parts: Parts, teacher: LoadedTeacher) -> None:
    """Score the teacher's own sample where it is due; alone, so that no other's batch changes."""
    due = parts.canaries.due(teacher.name)
    if due is not None:
        for _, states in teacher.hidden([due[0]], [due[1]], len(due[0]) + len(due[1])):
            parts.canaries.keep(teacher.name, states)


def rewards(parts: Parts, rollouts: Sequence[Rollout]) -> list[float | None]:
    """The verifier's verdict on every answer the student wrote; None without verifier or for other text."""
    decode = parts.inputs.student.tokenizer.decode
    stop = parts.plan.rollout.stop
    values: list[float | None] = []
    for rollout in rollouts:
        verify = parts.verifiers.get(rollout.prompt.source) if rollout.origin == "student" else None
        text = answer_text(rollout.response_ids, decode, stop) if verify else ""
        values.append(verify(text, rollout.prompt.reference) if verify else None)
    return values
