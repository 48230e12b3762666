"""The sequence over ranks: a rank's own positions, attention to all of them, rows of trained tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from mergeopd.student.megatron.grid import Grid


def width_multiple(grid: Grid) -> int:
    """Return the number that a padded sequence's length must be a multiple of."""
    halves = 2 * grid.context if grid.context > 1 else 1
    return halves * (grid.tensor if grid.sequence_parallel else 1)


def own_positions(width: int, grid: Grid) -> Tensor:
    """Return the positions of this context-parallel rank: a chunk of the first half and its mirror image.

    Under a causal mask later positions attend to more keys, so pairs of chunks balance the work.
    """
    if grid.context == 1:
        return torch.arange(width)
    size = width // (2 * grid.context)
    chunks = (grid.context_rank, 2 * grid.context - 1 - grid.context_rank)
    return torch.cat([torch.arange(chunk * size, (chunk + 1) * size) for chunk in chunks])


class CausalAttention(nn.Module):
    """Torch's fused attention as Megatron's core attention, over the keys of all context-parallel ranks.

    Megatron's own keeps a matrix of scores and refuses context parallelism. Keys and values of a layer are
    gathered in the order of positions; each chunk of queries attends to the keys up to its own end.
    """

    def __init__(self, config: TransformerConfig, *_: Any, pg_collection: Any, **__: Any) -> None:
        super().__init__()
        self.config, self._group = config, pg_collection.cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Attend from `[s, b, heads, d]` to `[s, b, groups, d]`; return `[s, b, heads * d]`."""
        num, rank = self._group.size(), self._group.rank()
        if num == 1:
            out = _attend(query, key, value)
        else:
            key, value = self._in_order(torch.stack([key, value], 2)).unbind(2)
            size = len(query) // 2
            ends = (rank + 1) * size, (2 * num - rank) * size
            parts = zip(torch.split(query, size), ends, strict=True)
            out = torch.cat([_attend(part, key[:end], value[:end]) for part, end in parts])
        return out.flatten(2)

    def _in_order(self, own: Tensor) -> Tensor:
        """Return all ranks' entries by position; the gradient is summed over ranks."""
        gathered = gather_from_sequence_parallel_region(own.contiguous(), group=self._group)
        chunks = gathered.chunk(2 * self._group.size())
        return torch.cat([*chunks[::2], *reversed(chunks[1::2])])


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend causally; the last query is at the last key's position."""
    is_square = len(query) == len(key)
    q, k, v = (states.permute(1, 2, 0, 3) for states in (query, key, value))
    out = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if is_square else causal_lower_right(len(query), len(key)),
        is_causal=is_square,
        enable_gqa=True,
    )
    return out.permute(2, 0, 1, 3)


class TrainedRows:
    """The hidden states that predict trained tokens, `[N, d]`, whole on every rank that computes losses.

    These ranks share the vocabulary, so that the gradient is partial on each: it is summed, and a rank keeps
    the rows of its own positions.
    """

    def __init__(self, grid: Grid) -> None:
        groups = grid.groups
        self._grid = grid
        self._split = groups.tp_cp if grid.sequence_parallel else groups.cp
        self._loss = groups.tp_cp

    def of(self, hidden_sbd: Tensor, rows_N: Tensor, width: int) -> Tensor:
        """Select from this rank's part of the sequence; `rows_N` index `[b, width]`, flat."""
        own = own_positions(width, self._grid)
        if self._grid.sequence_parallel:
            own = own.chunk(self._grid.tensor)[self._grid.tensor_rank]
        local = torch.full((width,), -1)
        local[own] = torch.arange(len(own))
        place = local[rows_N % width]
        slot = (place >= 0).nonzero().squeeze(1)
        index = place[slot] * hidden_sbd.shape[1] + (rows_N // width)[slot]
        rows: Tensor = _GatherRows.apply(  # type: ignore[no-untyped-call]
            hidden_sbd.flatten(0, 1),
            index.to(hidden_sbd.device),
            slot.to(hidden_sbd.device),
            len(rows_N),
            self._split,
            self._loss,
        )
        return rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_nd: Tensor, index: Tensor, slot: Tensor, num: int, split: Any, loss: Any
    ) -> Tensor:
        ctx.save_for_backward(index, slot)
        ctx.loss, ctx.shape = loss, hidden_nd.shape
        rows = hidden_nd.new_zeros(num, hidden_nd.shape[1]).index_copy_(0, slot, hidden_nd[index])
        if split.size() > 1:
            dist.all_reduce(rows, group=split)
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, slot = ctx.saved_tensors
        if ctx.loss.size() > 1:
            grad = grad.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(grad, group=ctx.loss)
        own = grad.new_zeros(ctx.shape).index_copy_(0, index, grad[slot])
        return own, None, None, None, None, None
