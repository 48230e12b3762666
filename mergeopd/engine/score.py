"""Score rounds: the teachers' passes, advantages, and the prior policy's log-probabilities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from mergeopd.batch.advantages import Outcomes, outcomes
from mergeopd.batch.records import Alignments, OldLogProbs
from mergeopd.distributed.communicator import Communicator
from mergeopd.engine.prior_policy import PriorPolicy
from mergeopd.engine.schedule import RoundSchedule, by_teacher
from mergeopd.engine.stages import Stages
from mergeopd.engine.targets import TeacherTargets
from mergeopd.recipe.training import Phase
from mergeopd.teacher.hidden_cache import HiddenCache
from mergeopd.teacher.local import ResidentHeads
from mergeopd.teacher.protocol import Teacher, TeacherSession, required_target
from mergeopd.teacher.token_view import TokenView
from mergeopd.types import Rollout

MakeCache = Callable[[RoundSchedule], AbstractContextManager[HiddenCache]]


@dataclass(frozen=True)
class CollectedRound:
    """Prompts with responses, not yet scored. `updates_done` counts the updates of the phase.

    `rewards` are None without a verifier, or if it failed; `failures` has the reasons by rollout.
    """

    phase: Phase
    updates_done: int
    rollouts: Sequence[Rollout]
    rewards: Sequence[float | None]
    work: RoundSchedule
    failures: Mapping[int, str] = field(default_factory=dict)

    def num_failures(self, members: Sequence[int]) -> dict[str, int]:
        """Count the rollouts among `members` whose verifier failed, by source."""
        return dict(Counter(self.rollouts[i].prompt.source for i in members if i in self.failures))


@dataclass(frozen=True)
class ScoredRound:
    """A round before its updates: advantages, the teachers' targets, and the prior policy's
    log-probabilities where the phase needs them.
    """

    collected: CollectedRound
    outcomes: Outcomes
    targets: TeacherTargets
    old: Mapping[int, OldLogProbs] = field(default_factory=dict)


class Scorer:
    """Scores rounds with their teachers, each opened once per round.

    `make_cache` creates the cache of a round's targets. Passes take at most `max_tokens` tokens.
    """

    def __init__(
        self,
        *,
        needs_prior_policy: Callable[[Phase], bool],
        max_tokens: int,
        teachers: Mapping[str, Teacher],
        views: Mapping[str, TokenView],
        heads: ResidentHeads,
        prior_policy: PriorPolicy,
        make_cache: MakeCache,
        ranks: Communicator,
        stages: Stages,
    ) -> None:
        self._needs_prior_policy = needs_prior_policy
        self._max_tokens = max_tokens
        self._teachers = teachers
        self._views = views
        self._heads = heads
        self._prior_policy = prior_policy
        self._make_cache = make_cache
        self._ranks = ranks
        self._stages = stages

    @contextmanager
    def score(self, collected: CollectedRound) -> Iterator[ScoredRound]:
        """Yield the scored round, whose memory is released when the context ends. Collective.

        Raises AbandonRound when a stop was requested.
        """
        phase, rollouts, work = collected.phase, collected.rollouts, collected.work
        spec = required_target(phase.loss)
        alignments = self.align(rollouts) if spec is not None else {}
        with self._make_cache(work) as cache:
            targets = TeacherTargets(cache, spec, self._views, self._heads, alignments)
            if spec is not None:
                with self._stages.timed("teachers"):
                    self.fill(targets, rollouts, work)
            old: Mapping[int, OldLogProbs] = {}
            if self._needs_prior_policy(phase):
                with self._stages.timed("update"):
                    old = self._prior_policy.score(rollouts, phase, work, targets)
            try:
                yield ScoredRound(collected, outcomes(rollouts, collected.rewards, phase), targets, old)
            finally:
                self._heads.release()

    def align(self, rollouts: Sequence[Rollout]) -> Alignments:
        """Align a round for teachers with other tokenizers, by teacher and rollout; not collective."""
        alignments = {}
        for name, view in self._views.items():
            own = {i: r for i, r in enumerate(rollouts) if name in r.prompt.teachers and r.num_trained}
            aligned = view.align(own)
            if aligned or view.bridge_kind is not None:
                alignments[name] = aligned
        return alignments

    def fill(self, targets: TeacherTargets, rollouts: Sequence[Rollout], work: RoundSchedule) -> None:
        """Put the targets of every trained token under each of its teachers into the cache. Collective.

        While one teacher scores, the next one's files are read ahead. Every process scores its share, and has
        the targets that it trains on when the pass ends.
        """
        passes = by_teacher(rollouts, tuple(sorted(self._teachers)), work.index)
        following = [one.teacher for one in passes[1:]] + [None]
        for one, next_teacher in zip(passes, following, strict=True):
            total = sum(rollouts[i].num_trained > 0 for i in one.rollouts)
            on_progress = self._stages.begin("teachers", one.teacher, total, "responses")
            with self._teachers[one.teacher].open() as session:
                if next_teacher is not None:
                    self._teachers[next_teacher].prefetch()

                def share(
                    name: str = one.teacher,
                    indices: Sequence[int] = one.rollouts,
                    session: TeacherSession = session,
                    on_progress: Callable[[int], None] = on_progress,
                ) -> None:
                    mine = work.scored_by(self._ranks.rank, indices)
                    sequences = targets.sequences(name, rollouts, mine)
                    order = list(sequences)
                    scored = session.score(list(sequences.values()), targets.spec_of(name), self._max_tokens)
                    for done, (position, rows) in enumerate(scored, start=1):
                        targets.cache.put(name, order[position], rows)
                        on_progress(done)

                self._ranks.run_and_gather(share)
            targets.cache.publish()
