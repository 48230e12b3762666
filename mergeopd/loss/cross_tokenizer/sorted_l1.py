"""The L1 distance of two sorted vectors, without a full sort.

Sorting both sides of a large vocabulary costs several times more than the rest of the loss. But for entry s
of rank i only the sign of the difference to the other side's entry of rank i is needed, which mostly follows
from counts: divide the numbers into 256 buckets per octave. Where all of a bucket's ranks on one side are
beyond those on the other side, the sign is the same for the whole bucket. Only the rest is sorted. The result
is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mergeopd.loss.buffers import Workspace

# A bucket is an exponent, -126 to 0, and 8 bits of mantissa; smaller numbers share the first bucket.
_OCTAVES, _MANTISSA_BITS = 127, 8
_NUM_BUCKETS = (_OCTAVES << _MANTISSA_BITS) + 1
_LAYOUT = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}


@dataclass(frozen=True, eq=False)
class Counted:
    """One side: values `[n, a]`, their buckets, and per bucket the ranks `(above, upto]` that it holds."""

    values: Tensor
    bucket: Tensor
    above: Tensor
    upto: Tensor


@dataclass(frozen=True, eq=False)
class Close:
    """One side's entries in undecided buckets, flat, best first within each bucket, buckets ascending.

    row, column  their indices
    value        their values
    bucket       counted over all rows, `row * buckets + bucket`
    rank         from 1, among all entries of the row
    """

    row: Tensor
    column: Tensor
    value: Tensor
    bucket: Tensor
    rank: Tensor


def sorted_l1(s_na: Tensor, t_nb: Tensor, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """Compute `sum_i |sort(s)_i - sort(t)_i|` per row `[n]`, both descending, the shorter zero-padded.

    Entries must be in [0, 1]. The second result `[n, a]` is the derivative with respect to `s`: the sign of
    each entry's difference, valid until the workspace is used again. The order of equal entries is arbitrary.
    """
    if not s_na.shape[1] or not t_nb.shape[1]:
        return s_na.sum(1) + t_nb.sum(1), torch.sign(s_na)
    s, t = _count(s_na, "s", workspace), _count(t_nb, "t", workspace)
    # Of s - t by rank, for all entries of a bucket at once; 0 is undecided.
    sign = (t.upto <= s.above).to(s_na.dtype).sub_((t.above >= s.upto).to(s_na.dtype))
    sign_s = _look_up(sign, s, "s.sign", workspace)
    sign_t = _look_up(sign, t, "t.sign", workspace)
    has_entries = (s.upto > s.above) | (t.upto > t.above)
    if ((sign == 0) & has_entries).any():
        close_s, close_t = _close(s, sign_s), _close(t, sign_t)
        sign_s[close_s.row, close_s.column] = _sign_by_rank(close_s, close_t, t)
        sign_t[close_t.row, close_t.column] = _sign_by_rank(close_t, close_s, s).neg_()
    return torch.linalg.vecdot(sign_s, s_na) - torch.linalg.vecdot(sign_t, t_nb), sign_s


def _count(values: Tensor, name: str, workspace: Workspace) -> Counted:
    integer, mantissa, bias = _LAYOUT[values.dtype]
    drop = mantissa - _MANTISSA_BITS
    bits = workspace.take(f"rank.{name}.bits", tuple(values.shape), integer, values.device)
    torch.bitwise_right_shift(values.view(integer), drop, out=bits)
    bits.sub_((bias - _OCTAVES) << _MANTISSA_BITS).clamp_(0, _NUM_BUCKETS - 1)
    bucket = workspace.take(f"rank.{name}.bucket", tuple(values.shape), torch.int64, values.device)
    bucket.copy_(bits)
    shape = (values.shape[0], _NUM_BUCKETS)
    count = torch.zeros(shape, dtype=torch.int32, device=values.device)
    count.scatter_add_(1, bucket, count.new_ones(()).expand(bucket.shape))
    below_or_in = count.cumsum(1, dtype=torch.int32)
    above = values.shape[1] - below_or_in
    return Counted(values, bucket, above, above + count)


def _look_up(table: Tensor, side: Counted, name: str, workspace: Workspace) -> Tensor:
    out = workspace.take(f"rank.{name}", tuple(side.bucket.shape), table.dtype, table.device)
    return torch.gather(table, 1, side.bucket, out=out)


def _close(side: Counted, sign: Tensor) -> Close:
    """The entries whose sign is still 0, with their ranks."""
    row, column = (sign == 0).nonzero(as_tuple=True)
    value = side.values[row, column]
    bucket = row * _NUM_BUCKETS + side.bucket[row, column]
    by_value = value.argsort(descending=True)
    order = by_value[bucket[by_value].argsort(stable=True)]
    row, column, value, bucket = row[order], column[order], value[order], bucket[order]
    place = torch.arange(len(bucket), device=bucket.device) - torch.searchsorted(bucket, bucket)
    return Close(row, column, value, bucket, side.above.flatten()[bucket] + place + 1)


def _sign_by_rank(own: Close, other: Close, counted_other: Counted) -> Tensor:
    """For each of `own`, the sign of its difference from the other side's entry of the same rank."""
    above, upto = (ranks.flatten()[own.bucket] for ranks in (counted_other.above, counted_other.upto))
    if not len(other.value):
        return torch.where(own.rank <= above, -1.0, 1.0).to(own.value.dtype)
    partner = torch.searchsorted(other.bucket, own.bucket) + own.rank - above - 1
    within = other.value[partner.clamp_(0, len(other.value) - 1)]
    sign = torch.sign(own.value - within)
    return torch.where(own.rank <= above, -1.0, torch.where(own.rank > upto, 1.0, sign)).to(own.value.dtype)
