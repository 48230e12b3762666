"""Aligned groups: runs of tokens of both models that cover the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Groups:
    """G groups of consecutive rows on both sides, int64 `[G]` each, in any order.

    first_S, num_S  first row and number of rows (at least 1) among the student's tokens
    first_T, num_T  the same among the teacher's
    follows         bool `[G]`: the group begins, in the same text, where the preceding one ends on both
                    sides, so that `Pieces` may look back across it. None: all false

    A row is a position that predicts a token. No row may be in two groups; rows in no group are left out.
    Raises ValueError for tensors that do not fit together.
    """

    first_S: Tensor
    num_S: Tensor
    first_T: Tensor
    num_T: Tensor
    follows: Tensor | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value, dtype = getattr(self, field.name), "bool" if field.name == "follows" else "int64"
            if value is None and dtype == "bool":
                continue
            if value.dtype != getattr(torch, dtype) or value.dim() != 1 or value.shape != self.first_S.shape:
                raise ValueError(
                    f"Groups.{field.name} must be {dtype} [G], of one length with first_S "
                    f"{list(self.first_S.shape)}, got {value.dtype} {list(value.shape)}"
                )

    def __len__(self) -> int:
        return self.first_S.shape[0]

    def check(self, num_rows_S: int, num_rows_T: int) -> None:
        """Raise ValueError for empty groups, rows that do not exist and rows in two groups."""
        for side, first, num, total in (
            ("student", self.first_S, self.num_S, num_rows_S),
            ("teacher", self.first_T, self.num_T, num_rows_T),
        ):
            stop = first + num
            wrong = (num < 1) | (first < 0) | (stop > total)
            if wrong.any():
                g = int(wrong.nonzero()[0])
                raise ValueError(
                    f"group {g} has the {side}'s rows {int(first[g])} to {int(stop[g]) - 1}, must be at "
                    f"least one row of the {total}; leave out groups that are empty on one side"
                )
            order = first.argsort()
            overlaps = first[order][1:] < stop[order][:-1]
            if overlaps.any():
                at = int(overlaps.nonzero()[0])
                a, b = int(order[at]), int(order[at + 1])
                raise ValueError(
                    f"groups {a} and {b} share the {side}'s row {int(first[b])}; "
                    "a token belongs to one group at most"
                )

    def take(self, order_G: Tensor) -> Groups:
        """Return the groups in another order; `follows` is meaningful where it keeps neighbours."""
        return Groups(
            first_S=self.first_S[order_G],
            num_S=self.num_S[order_G],
            first_T=self.first_T[order_G],
            num_T=self.num_T[order_G],
            follows=None if self.follows is None else self.follows[order_G],
        )

    def rows(self) -> tuple[Tensor, Tensor]:
        """`[sum num_S]` and `[sum num_T]`: both sides' rows, group by group."""
        return _rows(self.first_S, self.num_S), _rows(self.first_T, self.num_T)


def group_logratio(logprob_S: Tensor, logprob_T: Tensor, groups: Groups) -> Tensor:
    """`[N_S]`: each group's `log p_T - log p_S` at each of its student tokens; 0 at tokens in no group.

    logprob_S `[N_S]` and logprob_T `[N_T]` are the models' log-probabilities of their own tokens. By the
    chain rule a group's sum is exactly its log-probability after the preceding tokens, and the groups sum to
    the sequence's. With one token per group this is the sampled-token term of Thinking Machines' reverse KL.
    Meant as a detached advantage on `log p_S` of every token of the group.

    Needs no vocabulary map. Approximation: the same bytes have other tokenizations, whose probability is left
    out on both sides, so the ratio is that of the given tokens and not of the text.

    Differentiable in both. Raises ValueError for shapes and rows that do not fit.
    """
    for name, values in (("logprob_S", logprob_S), ("logprob_T", logprob_T)):
        if values.dim() != 1 or not values.dtype.is_floating_point:
            raise ValueError(f"{name} must be a float vector, got {values.dtype} {list(values.shape)}")
    groups.check(logprob_S.shape[0], logprob_T.shape[0])
    rows_S, rows_T = groups.rows()
    ratio_G = sum_rows(logprob_T[rows_T], groups.num_T) - sum_rows(logprob_S[rows_S], groups.num_S)
    ratio_rows = ratio_G.repeat_interleave(groups.num_S)
    return torch.zeros_like(logprob_S).index_put((rows_S,), ratio_rows.to(logprob_S.dtype))


def sum_rows(values_n: Tensor, num_g: Tensor) -> Tensor:
    """`[g]`: sums over consecutive runs of `num_g` entries."""
    group = group_of_rows(num_g)
    return values_n.new_zeros(num_g.shape[0]).index_add(0, group, values_n)


def group_of_rows(num_g: Tensor) -> Tensor:
    """`[sum num_g]`: the group of each row of consecutive runs."""
    return torch.arange(num_g.shape[0], device=num_g.device).repeat_interleave(num_g)


def portions(num_S: list[int], num_T: list[int], limit: int) -> Iterator[slice]:
    """Yield slices of whole groups with at most `limit` rows on either side; a larger group is alone."""
    start = rows_S = rows_T = 0
    for g, (more_S, more_T) in enumerate(zip(num_S, num_T, strict=True)):
        if g > start and (rows_S + more_S > limit or rows_T + more_T > limit):
            yield slice(start, g)
            start, rows_S, rows_T = g, 0, 0
        rows_S, rows_T = rows_S + more_S, rows_T + more_T
    if num_S:
        yield slice(start, len(num_S))


def _rows(first: Tensor, num: Tensor) -> Tensor:
    before = num.cumsum(0) - num
    return (first - before).repeat_interleave(num) + torch.arange(int(num.sum()), device=num.device)
