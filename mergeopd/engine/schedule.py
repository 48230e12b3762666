"""The schedule of a round: teacher passes, updates and micro-batches. No tensors, IO, clock or randomness.

Rollouts are named by their index in the round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergeopd.batch.packing import MicroBatchPlan, pack
from mergeopd.recipe.training import Optimizer
from mergeopd.types import Rollout


@dataclass(frozen=True, slots=True)
class TeacherPass:
    """One teacher's pass: the rollouts that it scores."""

    teacher: str
    rollouts: tuple[int, ...]


def by_teacher(
    rollouts: Sequence[Rollout], order: Sequence[str], round_index: int
) -> tuple[TeacherPass, ...]:
    """Return one pass for each teacher of the round, with all its rollouts.

    Teachers follow `order`, backwards in odd rounds (serpentine): a round begins with the last teacher of the
    previous one, whose files are still in the file cache. The order depends only on the round index, so a
    restart does not change it. Raises KeyError for a rollout whose teacher is not in `order`.
    """
    rollouts_of: dict[str, list[int]] = {name: [] for name in order}
    for index, rollout in enumerate(rollouts):
        for teacher in rollout.teacher_set:
            rollouts_of[teacher].append(index)
    names = order if round_index % 2 == 0 else tuple(reversed(order))
    return tuple(TeacherPass(name, tuple(rollouts_of[name])) for name in names if rollouts_of[name])


def split_updates(rollouts: Sequence[Rollout], num_updates: int) -> tuple[tuple[int, ...], ...]:
    """Split the round's rollouts into `num_updates` updates, stratified over domains.

    The numbers of a domain's rollouts, and of all rollouts, differ by at most one between updates. Rollouts
    keep their order.
    """
    members: dict[str, list[int]] = {}
    for index, rollout in enumerate(rollouts):
        members.setdefault(rollout.prompt.domain, []).append(index)
    updates: list[list[int]] = [[] for _ in range(num_updates)]
    # Assigned round-robin, without restarting at the first update for the next domain.
    assigned = [index for domain in sorted(members) for index in members[domain]]
    for position, index in enumerate(assigned):
        updates[position % num_updates].append(index)
    return tuple(tuple(sorted(update)) for update in updates)


@dataclass(frozen=True, slots=True)
class UpdatePlan:
    """One update of a round: its rollouts, and its micro-batches for each copy of the student."""

    rollouts: tuple[int, ...]
    packs: tuple[tuple[MicroBatchPlan, ...], ...]


@dataclass(frozen=True, slots=True)
class RoundSchedule:
    """Round number `index`: its updates, and the copy that trains and the rank that scores each rollout.

    `copy_of` and `scorer_of` have every rollout with trained tokens.
    """

    index: int
    updates: tuple[UpdatePlan, ...]
    copy_of: Mapping[int, int]
    scorer_of: Mapping[int, int]

    def scored_by(self, rank: int, rollouts: Sequence[int]) -> list[int]:
        """Return the `rollouts` that this rank scores, in order."""
        return [i for i in rollouts if self.scorer_of.get(i) == rank]

    def trained_by(self, copy: int, rollouts: Sequence[int]) -> list[int]:
        """Return the `rollouts` that this copy trains, in order, and those without trained tokens."""
        return [i for i in rollouts if self.copy_of.get(i, copy) == copy]

    def packs_of(self, copy: int) -> tuple[MicroBatchPlan, ...]:
        """Return a copy's micro-batches of the whole round, sorted by teacher set as in an update."""
        packs = [pack for update in self.updates for pack in update.packs[copy]]
        return tuple(sorted(packs, key=lambda p: p.teachers, reverse=self.index % 2 == 1))


def schedule_round(
    rollouts: Sequence[Rollout],
    index: int,
    *,
    num_updates: int,
    max_tokens: int,
    members: Sequence[Sequence[int]],
    packing: bool = False,
) -> RoundSchedule:
    """Assign a round's work to updates, copies and ranks.

    `members` has the ranks of each copy of the student; `packing` is that of `pack`. The micro-batches of an
    update are assigned to the copies in order, so every copy uses the teachers in the same order. A copy's
    rollouts are scored by its own ranks, where their hidden states are needed, balanced by length.
    """
    updates = []
    for chosen in split_updates(rollouts, num_updates):
        packs = pack(rollouts, chosen, max_tokens, index, packing=packing)
        updates.append(UpdatePlan(chosen, tuple(packs[copy :: len(members)] for copy in range(len(members)))))
    copy_of: dict[int, int] = {}
    scorer_of: dict[int, int] = {}
    for copy, ranks in enumerate(members):
        own = [i for update in updates for part in update.packs[copy] for i in part.rollouts]
        copy_of |= dict.fromkeys(own, copy)
        for position, i in enumerate(sorted(own, key=lambda i: (-rollouts[i].num_tokens, i))):
            scorer_of[i] = ranks[position % len(ranks)]
    return RoundSchedule(index, tuple(updates), copy_of, scorer_of)


def learning_rate(update: int, optimizer: Optimizer, num_updates: int) -> float:
    """Return the learning rate of update number `update` (from 0) of `num_updates`.

    Linear warm-up, reaching the peak at its last update; then constant, or linear or cosine down towards the
    final fraction of the peak, which an update after the last one would have.
    """
    warmup, final = optimizer.warmup_updates, optimizer.final_lr_fraction
    if update < warmup:
        return optimizer.lr * (update + 1) / warmup
    if optimizer.schedule == "constant":
        return optimizer.lr
    progress = (update - warmup) / (num_updates - warmup)
    is_linear = optimizer.schedule == "linear"
    remaining = 1.0 - progress if is_linear else 0.5 * (1.0 + math.cos(math.pi * progress))
    return optimizer.lr * (final + (1.0 - final) * remaining)


def clip_factor(grad_norm: float, limit: float | None) -> float:
    """Return the factor that clips a gradient of this norm to `limit`, as in torch."""
    return 1.0 if limit is None else min(1.0, limit / (grad_norm + 1e-6))
