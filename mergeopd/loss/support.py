"""Top-k supports: the token ids that a divergence compares one by one, and the treatment of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

Chooser = Literal["student", "teacher", "union"]
Rest = Literal["tail", "generalised"]

# Number of column groups whose maxima are searched first, and the width from which that is faster.
_GROUP, _WORTH_GROUPING = 32, 4


@dataclass(frozen=True)
class Support:
    """Divergences over the k most probable tokens A of each position instead of the whole vocabulary.

    k     number of ids per model, capped at the vocabulary
    of    whose top k: the student's, each teacher's for its own divergence, or both (up to 2k distinct ids).
          The student's cover the large weights of a reverse KL, a teacher's those of a forward KL
    rest  treatment of the other tokens. "tail": one more category with their whole mass; works for every
          divergence, and an f-divergence lies between 0 and its full value. "generalised": left out;
          `sum_A p_S log(p_S / p_T) - p_S + p_T` (forward: the arguments swapped), for the two KLs only

    Probabilities are over the whole vocabulary, never renormalised on A, and A itself is a constant. The
    plain truncated reverse KL is not offered: it pushes mass out of A even where both models are equal.

    `num_reductions`: collectives over a sharded vocabulary, for maxima, sums, candidates (an all-gather of k
    values and ids per rank) and the chosen tokens' logits, independent of the divergences.
    """

    k: int
    of: Chooser
    rest: Rest

    num_reductions: ClassVar[Literal[4]] = 4

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"Support: k is {self.k!r}, must be an integer of at least 1")
        for name, value, known in (("of", self.of, get_args(Chooser)), ("rest", self.rest, get_args(Rest))):
            if value not in known:
                raise ValueError(f"Support: {name} is {value!r}, must be one of {', '.join(known)}")


def top_columns(matrix_nV: Tensor, k: int) -> Tensor:
    """Return the columns `[n, min(k, V)]` of each row's largest entries, unordered; ties are arbitrary.

    A wide row is searched by groups: its k largest lie in the k groups with the largest maxima.
    """
    num, width = matrix_nV.shape
    if k >= width:
        return torch.arange(width, device=matrix_nV.device).expand(num, -1)
    num_groups = width // _GROUP
    if num_groups < _WORTH_GROUPING * k:
        return matrix_nV.topk(k, dim=1, sorted=False).indices
    grouped = num_groups * _GROUP
    maxima = matrix_nV[:, :grouped].view(num, _GROUP, num_groups).amax(1)
    groups = maxima.topk(k, dim=1, sorted=False).indices
    steps = torch.arange(0, grouped, num_groups, device=matrix_nV.device)
    left_over = torch.arange(grouped, width, device=matrix_nV.device).expand(num, -1)
    columns = torch.cat([(groups.unsqueeze(2) + steps).flatten(1), left_over], 1)
    best = matrix_nV.gather(1, columns).topk(k, dim=1, sorted=False).indices
    return columns.gather(1, best)


def top_ids(
    matrices: Sequence[Tensor], k: int, vocab: range, group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Return for each matrix `[n, V]` the token ids `[n, k]` of its rows' largest entries over all shards.

    `vocab` holds this shard's ids; k must be less than the whole vocabulary. Performs one all-gather of every
    rank's k best for all matrices together.
    """
    columns = [top_columns(matrix, k) for matrix in matrices]
    ids = [chosen + vocab.start for chosen in columns]
    if group is None or not matrices:
        return ids
    missing = k - columns[0].shape[1]
    values = torch.cat([matrix.gather(1, chosen) for matrix, chosen in zip(matrices, columns, strict=True)])
    all_values = _gathered(torch.nn.functional.pad(values, (0, missing), value=-torch.inf), group)
    all_ids = _gathered(torch.nn.functional.pad(torch.cat(ids), (0, missing), value=-1), group)
    best = all_values.topk(k, dim=1, sorted=False).indices
    return list(torch.split(all_ids.gather(1, best), [matrix.shape[0] for matrix in matrices]))


def _gathered(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own.contiguous(), group=group)
    return torch.cat(parts, 1)


@dataclass(frozen=True, eq=False)
class Members:
    """A support at n tokens: `ids_na`, `is_first_na` (false where an id is repeated), and the location of
    this shard's part of it: entry (row, slot) is column `column` of that row.
    """

    ids_na: Tensor
    is_first_na: Tensor
    row: Tensor
    slot: Tensor
    column: Tensor

    @classmethod
    def locate(cls, ids_na: Tensor, vocab: range) -> Members:
        """Locate the members among `ids_na`, which may contain an id twice."""
        ids_na = ids_na.sort(1).values
        is_first_na = torch.ones_like(ids_na, dtype=torch.bool)
        is_first_na[:, 1:] = ids_na[:, 1:] != ids_na[:, :-1]
        is_here = is_first_na & (ids_na >= vocab.start) & (ids_na < vocab.stop)
        row, slot = is_here.nonzero(as_tuple=True)
        return cls(ids_na, is_first_na, row, slot, ids_na[row, slot] - vocab.start)

    @property
    def num(self) -> Tensor:
        """`[n]`: distinct ids, over all shards."""
        return self.is_first_na.sum(1)

    def take(self, matrix_nV: Tensor) -> Tensor:
        """Return the members' entries, `[n, a]`; 0 at other shards' members and at repeated ids."""
        taken = matrix_nV.new_zeros(self.ids_na.shape)
        taken[self.row, self.slot] = matrix_nV[self.row, self.column]
        return taken

    def sum_outside(self, matrix_nV: Tensor) -> Tensor:
        """Sum this shard's other columns, `[n]`, without cancellation. The matrix is unchanged on return."""
        inside = matrix_nV[self.row, self.column]
        matrix_nV[self.row, self.column] = 0.0
        outside = matrix_nV.sum(1)
        matrix_nV[self.row, self.column] = inside
        return outside
