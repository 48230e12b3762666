"""Which sequences share a padded batch. Pure, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from mergeopd.types import Rollout

# What a pass over the model costs beside its tokens (calls of every layer, gradients of every weight), as a
# share of the largest pass allowed. Less would make many small batches of what little padding there is.
_PASS_SHARE = 1 / 64


def length_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices grouped so that a group padded to its longest member holds at most `max_tokens` tokens.

    Longest first, neighbours in length together. Of all such groupings it is the cheapest one, where a group
    costs its tokens, padding included, and a little for the pass itself: lengths that differ widely are not
    padded to each other for the sake of a full batch. A single sequence longer than `max_tokens` gets a group
    of its own. Every index appears exactly once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    sizes = [lengths[i] for i in order]
    total = [0, *accumulate(sizes)]
    per_pass = max_tokens * _PASS_SHARE
    # cost[j]: of the cheapest grouping of the j longest, whose last group begins at start[j].
    cost, start = [0.0], [0]
    for end in range(1, len(order) + 1):
        best, begin = float("inf"), end - 1
        for first in range(end - 1, -1, -1):
            tokens = (end - first) * sizes[first]
            if (first < end - 1 and tokens > max_tokens) or total[first] + tokens + per_pass >= best:
                break  # a still larger group is too large, or has more padding than it could save
            if cost[first] + tokens + per_pass < best:
                best, begin = cost[first] + tokens + per_pass, first
        cost.append(best)
        start.append(begin)
    batches = []
    end = len(order)
    while end:
        batches.append(order[start[end] : end])
        end = start[end]
    return batches[::-1]


@dataclass(frozen=True, slots=True)
class MicroBatchPlan:
    """Rollouts of one micro-batch: one teacher set, similar lengths."""

    teachers: tuple[str, ...]
    rollouts: tuple[int, ...]


def pack(
    rollouts: Sequence[Rollout], update: Sequence[int], max_tokens: int, round_index: int
) -> tuple[MicroBatchPlan, ...]:
    """The micro-batches of an update, sorted by teacher set, so that a set's heads are fetched once.

    Serpentine like the turns. A micro-batch padded to its longest member holds at most `max_tokens` tokens.
    Responses without a trained token carry no loss and are left out.
    """
    sets: dict[tuple[str, ...], list[int]] = {}
    for index in update:
        if rollouts[index].num_trained:
            sets.setdefault(rollouts[index].teacher_set, []).append(index)
    packs = []
    for teachers in sorted(sets, reverse=round_index % 2 == 1):
        members = sets[teachers]
        for batch in length_batches([rollouts[i].num_tokens for i in members], max_tokens):
            packs.append(MicroBatchPlan(teachers, tuple(members[i] for i in batch)))
    return tuple(packs)
