"""Group sequences into padded batches. No tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from mergeopd.types import Rollout

# Fixed cost of a pass over the model (layer calls, gradients of all weights), as a fraction of the largest
# pass allowed. A smaller fraction would make many small batches to save little padding.
_PASS_SHARE = 1 / 64


def sum_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group indices so that the lengths of a group sum to at most `max_tokens`, longest first.

    A sequence longer than `max_tokens` gets a group of its own. Every index appears exactly once.
    """
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or lengths[i] > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(i)
        room -= lengths[i]
    return batches


def length_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group indices so that a group padded to its longest member has at most `max_tokens` tokens.

    Indices are sorted by length, longest first, and split at the cheapest places; a group costs its tokens,
    padding included, plus a fixed cost of the pass. A sequence longer than `max_tokens` gets a group of its
    own. Every index appears exactly once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    sizes = [lengths[i] for i in order]
    total = [0, *accumulate(sizes)]
    per_pass = max_tokens * _PASS_SHARE
    # cost[j]: cost of the cheapest grouping of the j longest, whose last group begins at start[j].
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
    rollouts: Sequence[Rollout],
    update: Sequence[int],
    max_tokens: int,
    round_index: int,
    *,
    packing: bool = False,
) -> tuple[MicroBatchPlan, ...]:
    """Plan the micro-batches of an update, sorted by teacher set, so that a set's heads are read once.

    The order is reversed in odd rounds, as that of the teacher passes. A micro-batch padded to its longest
    member has at most `max_tokens` tokens; with `packing`, which needs no padding, one of any lengths.
    Responses without a trained token have no loss and are left out.
    """
    sets: dict[tuple[str, ...], list[int]] = {}
    for index in update:
        if rollouts[index].num_trained:
            sets.setdefault(rollouts[index].teacher_set, []).append(index)
    packs, group = [], sum_batches if packing else length_batches
    for teachers in sorted(sets, reverse=round_index % 2 == 1):
        members = sets[teachers]
        for batch in group([rollouts[i].num_tokens for i in members], max_tokens):
            packs.append(MicroBatchPlan(teachers, tuple(members[i] for i in batch)))
    return tuple(packs)
