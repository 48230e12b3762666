"""Score rounds: the teachers' passes, advantages, and the prior policy's log-probabilities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial

from mergeopd.batch.advantages import Outcomes, outcomes
from mergeopd.batch.records import Alignments, OldLogProbs
from mergeopd.engine.prior_policy import PriorPolicy
from mergeopd.engine.schedule import RoundSchedule, TeacherPass, by_teacher
from mergeopd.engine.stages import Stages
from mergeopd.engine.targets import TeacherTargets
from mergeopd.errors import TeacherError
from mergeopd.messages import shown
from mergeopd.recipe.training import Phase
from mergeopd.reporting.events import ServingStats
from mergeopd.teacher.hidden_cache import HiddenCache
from mergeopd.teacher.local import ResidentHeads
from mergeopd.teacher.protocol import Teacher, TeacherSession, required_target
from mergeopd.teacher.recorded import UnrecordedSequences
from mergeopd.teacher.token_view import TokenView
from mergeopd.types import Rollout

MakeCache = Callable[[RoundSchedule], AbstractContextManager[HiddenCache]]


@dataclass(frozen=True)
class CollectedRound:
    """Prompts with responses, not yet scored. `updates_done` counts the updates of the phase.

    `rewards` are None without a verifier, or if it failed; `failures` has the reasons by rollout. `text_kept`
    is the share of teachers' responses that the phase keeps, by teacher and domain; empty if it keeps all.
    `serving` is None without inference servers.
    """

    phase: Phase
    updates_done: int
    rollouts: Sequence[Rollout]
    rewards: Sequence[float | None]
    work: RoundSchedule
    failures: Mapping[int, str] = field(default_factory=dict)
    text_kept: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    serving: ServingStats | None = None

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


@dataclass(frozen=True)
class Scorer:
    """Scores rounds with their teachers, each opened once per round.

    `make_cache` creates the cache of a round's targets. Passes take at most `max_tokens` tokens.
    """

    needs_prior_policy: Callable[[Phase], bool]
    max_tokens: int
    teachers: Mapping[str, Teacher]
    views: Mapping[str, TokenView]
    heads: ResidentHeads
    prior_policy: PriorPolicy
    make_cache: MakeCache
    stages: Stages

    @contextmanager
    def score(self, collected: CollectedRound) -> Iterator[ScoredRound]:
        """Yield the scored round, whose memory is released when the context ends. Collective.

        Raises AbandonRound when a stop was requested.
        """
        phase, rollouts, work = collected.phase, collected.rollouts, collected.work
        spec = required_target(phase.loss)
        alignments = self.align(rollouts) if spec is not None else {}
        with self.make_cache(work) as cache:
            targets = TeacherTargets(cache, spec, self.views, self.heads, alignments)
            if spec is not None:
                with self.stages.clock.stage("teachers"):
                    self.fill(targets, rollouts, work)
            old: Mapping[int, OldLogProbs] = {}
            if self.needs_prior_policy(phase):
                with self.stages.clock.stage("update"):
                    old = self.prior_policy.score(rollouts, phase, work, targets)
            try:
                yield ScoredRound(collected, outcomes(rollouts, collected.rewards, phase), targets, old)
            finally:
                self.heads.release()

    def align(self, rollouts: Sequence[Rollout]) -> Alignments:
        """Align a round for teachers with other tokenizers, by teacher and rollout; not collective."""
        alignments = {}
        for name, view in self.views.items():
            own = {i: r for i, r in enumerate(rollouts) if name in r.prompt.scorers and r.num_trained}
            if view.bridge_kind is not None:
                self.stages.begin("teachers", f"{name}: aligning tokens", len(own), "responses")
            aligned = view.align(own)
            if aligned or view.bridge_kind is not None:
                alignments[name] = aligned
        return alignments

    def fill(self, targets: TeacherTargets, rollouts: Sequence[Rollout], work: RoundSchedule) -> None:
        """Put the targets of every trained token under each of its teachers into the cache. Collective.

        While one teacher scores, the next one's files are read ahead. Every process scores its share, and has
        the targets that it trains on when the pass ends.
        """
        passes = by_teacher(rollouts, tuple(sorted(self.teachers)), work.index)
        following = [one.teacher for one in passes[1:]] + [None]
        for one, next_teacher in zip(passes, following, strict=True):
            total = sum(rollouts[i].num_trained > 0 for i in one.rollouts)
            on_progress = self.stages.begin("teachers", one.teacher, total, "responses")
            with self.teachers[one.teacher].open() as session:
                if next_teacher is not None:
                    self.teachers[next_teacher].prefetch()
                score = partial(self._score_own, one, session, targets, rollouts, work, on_progress)
                self.stages.ranks.run_and_gather(score)
            targets.cache.publish()

    def _score_own(
        self,
        one: TeacherPass,
        session: TeacherSession,
        targets: TeacherTargets,
        rollouts: Sequence[Rollout],
        work: RoundSchedule,
        on_progress: Callable[[int], None],
    ) -> None:
        """Score this process's share of a teacher's pass."""
        sequences = targets.sequences(
            one.teacher, rollouts, work.scored_by(self.stages.ranks.rank, one.rollouts)
        )
        order = list(sequences)
        try:
            scored = session.score(list(sequences.values()), targets.spec_of(one.teacher), self.max_tokens)
            for done, (position, rows) in enumerate(scored, start=1):
                targets.cache.put(one.teacher, order[position], rows)
                on_progress(done)
        except UnrecordedSequences as lacking:
            first = rollouts[order[lacking.indices[0]]].prompt.key
            raise TeacherError(
                f"{shown(lacking.folder)} lacks the targets of teacher '{one.teacher}' for "
                f"{len(lacking.indices)} of {len(order)} responses of a round, such as that to prompt "
                f"'{first}': the text has changed since they were recorded; run `mergeopd targets` again, "
                "which adds them, then run the same command again"
            ) from lacking
