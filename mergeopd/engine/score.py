"""Score rounds: the teachers' passes, advantages, and the prior policy's log-probabilities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from mergeopd.batch.advantages import Outcomes, outcomes
from mergeopd.batch.records import Alignments, PriorScores
from mergeopd.engine.prior_policy import PriorPolicy
from mergeopd.engine.schedule import RoundSchedule, TeacherPass, by_teacher
from mergeopd.engine.stages import Stages
from mergeopd.engine.targets import TeacherTargets
from mergeopd.errors import TeacherError
from mergeopd.messages import shown
from mergeopd.recipe.training import Phase
from mergeopd.reporting.events import ServingStats
from mergeopd.student.protocol import Placement
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
    `selected` is the share of each source's prompts that the phase draws from; empty without `select`.
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
    selected: Mapping[str, float] = field(default_factory=dict)

    def num_failures(self, members: Sequence[int]) -> dict[str, int]:
        """Count the rollouts among `members` whose verifier failed, by source."""
        return dict(Counter(self.rollouts[i].prompt.source for i in members if i in self.failures))


@dataclass(frozen=True)
class ScoredRound:
    """A round before its updates: advantages, the teachers' targets, and the prior policy's scores where
    the phase needs them.
    """

    collected: CollectedRound
    outcomes: Outcomes
    targets: TeacherTargets
    old: PriorScores = field(default_factory=PriorScores)


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
        alignments = self.align(rollouts, work) if spec is not None else {}
        with self.make_cache(work) as cache:
            targets = TeacherTargets(cache, spec, self.views, self.heads, alignments)
            if spec is not None:
                targets = self._with_supports(targets, collected)
                with self.stages.clock.stage("teachers"):
                    self.fill(targets, rollouts, work)
            old = PriorScores()
            if self.needs_prior_policy(phase):
                with self.stages.clock.stage("update"):
                    old = self.prior_policy.score(rollouts, phase, work, targets)
            try:
                yield ScoredRound(collected, outcomes(rollouts, collected.rewards, phase), targets, old)
            finally:
                self.heads.release()

    def align(self, rollouts: Sequence[Rollout], work: RoundSchedule) -> Alignments:
        """Align this copy's rollouts for teachers with other tokenizers, by teacher and rollout.

        Not collective: the ranks of a copy do the same work.
        """
        alignments = {}
        trained = [i for i, copy in work.copy_of.items() if copy == self._placement.dp_rank]
        for name, view in self.views.items():
            own = {i: rollouts[i] for i in sorted(trained) if name in rollouts[i].prompt.scorers}
            if view.bridge_kind is not None:
                self.stages.begin("teachers", f"{name}: aligning tokens", len(own), "responses")
            aligned = view.align(own)
            if aligned or view.bridge_kind is not None:
                alignments[name] = aligned
        return alignments

    def fill(self, targets: TeacherTargets, rollouts: Sequence[Rollout], work: RoundSchedule) -> None:
        """Put the targets of every trained token under each of its teachers into the cache. Collective.

        Served teachers score while the others do. While one teacher scores, the next one's files are read
        ahead. Every process scores its share, and has the targets that it trains on when the pass ends.
        """
        passes = by_teacher(rollouts, tuple(sorted(self.teachers)), work.index)
        served = [one for one in passes if self.teachers[one.teacher].capabilities.is_served]
        local = [one for one in passes if one not in served]
        following = [*(one.teacher for one in local[1:]), None]
        ranks = self.stages.ranks
        with ExitStack() as open_sessions:
            begun = []
            for one in served:
                session = open_sessions.enter_context(self.teachers[one.teacher].open())
                begin = partial(self._begin, one, session, targets, rollouts, work)
                ranks.run_and_gather(lambda begin=begin: begun.append(begin()))  # type: ignore[misc]
            for one, next_teacher in zip(local, following, strict=False):
                with self.teachers[one.teacher].open() as session:
                    if next_teacher is not None:
                        self.teachers[next_teacher].prefetch()
                    begin = partial(self._begin, one, session, targets, rollouts, work)
                    self._collect(one, begin, targets, rollouts)
            for one, scored in zip(served, begun, strict=True):
                self._collect(one, lambda scored=scored: scored, targets, rollouts)  # type: ignore[misc]

    def _begin(
        self,
        one: TeacherPass,
        session: TeacherSession,
        targets: TeacherTargets,
        rollouts: Sequence[Rollout],
        work: RoundSchedule,
    ) -> Generator[tuple[int, Tensor], None, None]:
        """Begin to score this process's share of a teacher's pass; yield rows by rollout."""
        spec = targets.spec_of(one.teacher)
        if spec.kind == "student_top_k":  # shared by those that know the student's ids
            own, loss_ranks = [i for i in one.rollouts if i in targets.supports], self._loss_ranks
            rank = self.stages.ranks.rank
            share = own[loss_ranks.index(rank) :: len(loss_ranks)] if rank in loss_ranks else []
        else:
            share = work.scored_by(self.stages.ranks.rank, one.rollouts)
        sequences = targets.sequences(one.teacher, rollouts, share)
        order = list(sequences)
        scored = session.score(list(sequences.values()), spec, self.max_tokens)
        return self._named(one, order, scored, rollouts)

    def _named(
        self,
        one: TeacherPass,
        order: Sequence[int],
        scored: Iterator[tuple[int, Tensor]],
        rollouts: Sequence[Rollout],
    ) -> Generator[tuple[int, Tensor], None, None]:
        """Yield rows by rollout; name the prompts of sequences without recorded targets."""
        try:
            for position, rows in scored:
                yield order[position], rows
        except UnrecordedSequences as lacking:
            first = rollouts[order[lacking.indices[0]]].prompt.key
            raise TeacherError(
                f"{shown(lacking.folder)} lacks the targets of teacher '{one.teacher}' for "
                f"{len(lacking.indices)} of {len(order)} responses of a round, such as that to prompt "
                f"'{first}': the text has changed since they were recorded; run `mergeopd targets` again, "
                "which adds them, then run the same command again"
            ) from lacking

    def _collect(
        self,
        one: TeacherPass,
        begin: Callable[[], Generator[tuple[int, Tensor], None, None]],
        targets: TeacherTargets,
        rollouts: Sequence[Rollout],
    ) -> None:
        """Put the rows of a teacher's pass into the cache. Collective."""
        total = sum(rollouts[i].num_trained > 0 for i in one.rollouts)
        on_progress = self.stages.begin("teachers", one.teacher, total, "responses")

        def collect() -> None:
            # Closed at once, so that a streamed teacher's other ranks are told before the next collective.
            with closing(begin()) as scored:
                for done, (rollout, rows) in enumerate(scored, start=1):
                    targets.cache.put(one.teacher, rollout, rows)
                    on_progress(done)

        self.stages.ranks.run_and_gather(collect)
        targets.cache.publish()

    @property
    def _placement(self) -> Placement:
        return self.prior_policy.student.placement

    @property
    def _loss_ranks(self) -> Sequence[int]:
        return self._placement.loss_ranks[self._placement.dp_rank]

    def _with_supports(self, targets: TeacherTargets, collected: CollectedRound) -> TeacherTargets:
        """Add the student's likeliest ids where a teacher of the round is asked for them. Collective."""
        names = {name for rollout in collected.rollouts for name in rollout.teacher_set}
        specs = [targets.spec_of(name) for name in sorted(names)]
        wanted = [spec.k for spec in specs if spec.kind == "student_top_k" and spec.k is not None]
        if not wanted:
            return targets
        with self.stages.clock.stage("teachers"):
            supports = self.prior_policy.top_ids(
                collected.rollouts, collected.phase, collected.work, targets, max(wanted)
            )
        return replace(targets, supports=supports)
