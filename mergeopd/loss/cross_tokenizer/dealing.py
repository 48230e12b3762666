"""Groups dealt to the ranks that share both vocabularies, and the exchange of shards for whole rows.

A bridge compares any entry of one vocabulary with any of the other: by rank, by identity or by spelling. So a
rank scores all columns of some rows instead of some columns of all rows, by the code of a single process. An
all-to-all of each model's logits turns shards into rows; one more returns the gradient of the student's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, zip_longest
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from mergeopd.loss.buffers import Workspace
from mergeopd.loss.cross_tokenizer.groups import Groups, portions
from mergeopd.loss.heads import Head


@dataclass(frozen=True)
class Shards:
    """One model's vocabulary over the ranks of a group.

    `widths` are the columns of each rank, `order` the ranks by first token id.
    """

    widths: tuple[int, ...]
    order: tuple[int, ...]

    @classmethod
    def of(cls, name: str, starts: Sequence[int], widths: Sequence[int]) -> Self:
        """Raise ValueError unless the parts are a partition of token ids from 0."""
        order = sorted(range(len(starts)), key=lambda rank: (starts[rank], widths[rank]))
        stops = [0, *accumulate(widths[rank] for rank in order)]
        if not stops[-1] or any(
            widths[rank] and starts[rank] != stop for rank, stop in zip(order, stops, strict=False)
        ):
            parts = ", ".join(f"[{starts[rank]}, {starts[rank] + widths[rank]})" for rank in order)
            raise ValueError(
                f"the {name}'s head scores token ids {parts}; a bridge needs all ids from 0, each once: give "
                "every rank its shard, and the group of these ranks"
            )
        return cls(tuple(widths), tuple(order))

    @property
    def size(self) -> int:
        return sum(self.widths)


@dataclass(frozen=True)
class Exchange:
    """All-to-alls between shards of all rows and whole rows of some; no communication without a group."""

    group: dist.ProcessGroup | None
    workspace: Workspace

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def world(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def shards(self, heads: Sequence[tuple[str, Head]], problem: ValueError | None) -> list[Shards]:
        """Return every model's partition of its vocabulary. Collective.

        Raises `problem`, a ValueError on the other ranks if any rank has one, and that of `Shards.of`.
        """
        own = [int(problem is not None), *(n for _, h in heads for n in (h.vocab.start, len(h.vocab)))]
        facts = torch.tensor([own], device=heads[0][1].weight.device)
        if self.group is not None:
            facts = facts.new_empty(self.world, len(own)).copy_(self._gathered(facts))
        if problem is not None:
            raise problem
        has_problem, *ranges = facts.t().tolist()
        if any(has_problem):
            raise ValueError("on another rank of the group, hidden states and head do not match")
        return [Shards.of(name, *ranges[2 * i : 2 * i + 2]) for i, (name, _) in enumerate(heads)]

    def to_rows(self, columns_nV: Tensor, shards: Shards, counts: Sequence[int], name: str) -> Tensor:
        """Return this rank's rows `[m, V]`, `counts` of each rank, from its columns of all ranks' rows."""
        if self.group is None:
            return columns_nV
        num = counts[self.rank]
        flat = columns_nV.new_empty(num * shards.size)
        received = [num * width for width in shards.widths]
        sent = [count * columns_nV.shape[1] for count in counts]
        dist.all_to_all_single(flat, columns_nV.reshape(-1), received, sent, group=self.group)
        blocks = [b.view(num, w) for b, w in zip(torch.split(flat, received), shards.widths, strict=True)]
        out = self.workspace.take(f"{name}.rows", (num, shards.size), flat.dtype, flat.device)
        return torch.cat([blocks[rank] for rank in shards.order], 1, out=out)

    def to_columns(self, rows_mV: Tensor, shards: Shards, counts: Sequence[int], out_nV: Tensor) -> None:
        """Invert `to_rows` into `out_nV`."""
        if self.group is None:
            return
        widths = [shards.widths[rank] for rank in shards.order]
        blocks = dict(zip(shards.order, torch.split(rows_mV, widths, 1), strict=True))
        flat = torch.cat([blocks[rank].reshape(-1) for rank in range(self.world)])
        received = [count * out_nV.shape[1] for count in counts]
        sent = [len(rows_mV) * width for width in shards.widths]
        dist.all_to_all_single(out_nV.view(-1), flat, received, sent, group=self.group)

    def sum(self, partial: Tensor) -> None:
        if self.group is not None:
            dist.all_reduce(partial, group=self.group)

    def _gathered(self, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(parts, own, group=self.group)
        return torch.cat(parts)


@dataclass(frozen=True)
class Deal:
    """Groups in the order in which they are scored, and steps: for each rank, a slice of that order.

    A step's slices follow each other and hold at most `chunk_rows` rows on either side, unless a single group
    exceeds its rank's share.
    """

    order: tuple[int, ...]
    steps: tuple[tuple[slice, ...], ...]

    @classmethod
    def of(cls, groups: Groups, world: int, chunk_rows: int, *, keep_runs: bool) -> Self:
        """Deal consecutive groups to each rank, with about equal numbers of rows.

        With `keep_runs`, groups that continue each other go to one rank.
        """
        num_S, num_T = groups.num_S.tolist(), groups.num_T.tolist()
        continues = [False] * len(num_S)
        if keep_runs and groups.follows is not None:
            continues = groups.follows.tolist()
        own = _shares([a + b for a, b in zip(num_S, num_T, strict=True)], continues, world)
        limit = max(chunk_rows // world, 1)
        portioned = [
            [range(share.start + p.start, share.start + p.stop) for p in portions(*sizes, limit)]
            for share in own
            for sizes in [(num_S[share.start : share.stop], num_T[share.start : share.stop])]
        ]
        steps = list(zip_longest(*portioned, fillvalue=range(0)))
        bounds = [0, *accumulate(len(part) for step in steps for part in step)]
        slices = iter([slice(*pair) for pair in pairwise(bounds)])
        return cls(
            tuple(g for step in steps for part in step for g in part),
            tuple(tuple(next(slices) for _ in step) for step in steps),
        )


def _shares(costs: Sequence[int], continues: Sequence[bool], world: int) -> Iterator[range]:
    """Yield each rank's range of groups, cut only where a group does not continue the one before it."""
    total, done, rank, start = sum(costs), 0, 0, 0
    for g, (cost, is_continued) in enumerate(zip(costs, continues, strict=True)):
        while not is_continued and rank < done * world // max(total, 1):
            yield range(start, g)
            rank, start = rank + 1, g
        done += cost
    yield range(start, len(costs))
    for _ in range(rank + 1, world):
        yield range(len(costs), len(costs))
