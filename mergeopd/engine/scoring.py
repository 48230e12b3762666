"""The teachers' turns of a round, and the verifiers'."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mergeopd.engine.batch import Before
from mergeopd.engine.build import Parts
from mergeopd.engine.observing import Observed, reduced
from mergeopd.engine.outcomes import Outcomes
from mergeopd.engine.schedule import RoundWork, Turn, by_teacher
from mergeopd.engine.writing import answer_text, progress
from mergeopd.loss.heads import Head
from mergeopd.ranks import spread
from mergeopd.recipe.training import Phase
from mergeopd.report.events import Reporter, StageStarted
from mergeopd.teacher.store import LoadedTeacher
from mergeopd.types import Rollout

Told = Callable[[int], None]


@dataclass(frozen=True)
class ScoredRound:
    """A round before its updates.

    `verdicts` belong to the rollouts, `outcomes` says what they mean, `observed` is what the teachers left,
    and `before` the policy before the first update, where that is needed. `work` says what each update takes.
    """

    phase: Phase
    work: RoundWork
    rollouts: Sequence[Rollout]
    verdicts: Sequence[float | None]
    observed: Observed
    outcomes: Outcomes
    before: Mapping[int, Before]


def score(
    parts: Parts,
    rollouts: Sequence[Rollout],
    work: RoundWork,
    observed: Observed,
    reporter: Reporter,
) -> None:
    """Put what is to be kept of every trained token under each of its teachers into the cache.

    Each teacher is loaded once, sees the prompt through its own template, and gets the response's ids as
    they were written. While it scores, the next teacher's files are read ahead. A teacher of which no hidden
    states are kept has its head in memory during its turn, else only during the updates. Every process
    scores its share, and has what it will train on when the turn is over.
    """
    turns = by_teacher(rollouts, tuple(sorted(parts.plan.teachers)), work.index)
    following = [turn.teacher for turn in turns[1:]] + [None]
    for turn, next_teacher in zip(turns, following, strict=True):
        total = sum(rollouts[i].num_trained > 0 for i in turn.rollouts)
        reporter.emit(StageStarted("teachers", turn.teacher, total, "answers"))
        told = progress(reporter, total, parts.ranks)
        with parts.store.open(turn.teacher) as teacher:
            if next_teacher is not None:
                parts.store.read_ahead(next_teacher)

            def own(teacher: LoadedTeacher = teacher, turn: Turn = turn, told: Told = told) -> None:
                score_canary(parts, teacher)
                mine = work.scored_by(parts.ranks.rank, turn.rollouts)
                for done, (index, rows) in enumerate(
                    _kept(parts, teacher, rollouts, mine, observed), start=1
                ):
                    observed.cache.put(turn.teacher, index, rows)
                    told(done)

            parts.ranks.share(own)
        observed.cache.publish()
        parts.store.heads(())


def _kept(
    parts: Parts, teacher: LoadedTeacher, rollouts: Sequence[Rollout], mine: Sequence[int], observed: Observed
) -> Iterator[tuple[int, Tensor]]:
    """`(index, what is kept of its tokens)` of the rollouts `mine`, in the tokens that the teacher reads."""
    dialect, what = parts.inputs.teachers[teacher.name], observed.kept_of(parts, teacher.name)
    aligned = observed.alignments.get(teacher.name)
    read = [i for i in mine if aligned is None or len(aligned[i].teacher_ids)]
    responses = [
        rollouts[i].response_ids if aligned is None else aligned[i].teacher_ids.tolist() for i in read
    ]
    hidden = teacher.hidden(
        [dialect.render(rollouts[i].prompt) for i in read],
        responses,
        parts.plan.student.micro_batch_tokens,
        [rollouts[i].trained for i in read],
    )
    if what.kind != "hidden":
        answers = [rollouts[i].trained_ids for i in read] if aligned is None else responses
        hidden = reduced(hidden, answers, _true_head(parts, teacher.name), what)
    return ((read[position], rows) for position, rows in hidden)


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
        if parts.ranks.size > 1:  # whoever updates may have a part of the head alone
            _true_head(parts, teacher.name)


def rewards(parts: Parts, rollouts: Sequence[Rollout]) -> list[float | None]:
    """The verifier's verdict on every answer the student wrote; None without verifier or for other text."""
    tokenizer = parts.inputs.student.tokenizer
    stop = parts.plan.rollout.stop

    def verdict(rollout: Rollout) -> float | None:
        verify = parts.verifiers.get(rollout.prompt.source) if rollout.origin == "student" else None
        if verify is None:
            return None
        return verify(answer_text(rollout.response_ids, tokenizer, stop), rollout.prompt.reference)

    return spread(parts.ranks, rollouts, lambda own: [verdict(rollout) for rollout in own])
