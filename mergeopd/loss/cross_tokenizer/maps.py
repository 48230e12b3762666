"""Maps between two vocabularies, as index tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Tolerance for rounding in the sum of a row's weights.
_ROUNDING = 1e-3


@dataclass(frozen=True, eq=False)
class ExactPairs:
    """Token ids of the same bytes: `ids_S[i]` matches `ids_T[i]`, int64 `[M]`, none twice on a side.

    vocab_S, vocab_T  sizes of the true vocabularies
    rest_S, rest_T    computed here: the ids without a partner, ascending

    Raises ValueError for ids that do not fit.
    """

    ids_S: Tensor
    ids_T: Tensor
    vocab_S: int
    vocab_T: int
    rest_S: Tensor = field(init=False)
    rest_T: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if self.ids_S.shape != self.ids_T.shape:
            raise ValueError(
                f"ExactPairs: ids_S {list(self.ids_S.shape)} and ids_T {list(self.ids_T.shape)} must pair up"
            )
        for side, ids, size in (("S", self.ids_S, self.vocab_S), ("T", self.ids_T, self.vocab_T)):
            if ids.dtype != torch.int64 or ids.dim() != 1:
                raise ValueError(
                    f"ExactPairs.ids_{side} must be int64 [M], got {ids.dtype} {list(ids.shape)}"
                )
            _check_range(f"ExactPairs.ids_{side}", ids, size, "the vocabulary")
            is_rest = torch.ones(size, dtype=torch.bool, device=ids.device)
            is_rest[ids] = False
            rest = is_rest.nonzero().squeeze(1)
            if rest.shape[0] + ids.shape[0] != size:
                twice = int(ids.bincount().argmax())
                raise ValueError(f"ExactPairs.ids_{side}: id {twice} has two partners; keep one of them")
            object.__setattr__(self, f"rest_{side}", rest)


@dataclass(frozen=True, eq=False)
class SparseMap:
    """X-Token's projection W of student probabilities into the teacher's vocabulary (2605.21699).

    ids      `[V_S, k]` int64 teacher ids; an entry of weight 0 is ignored
    weights  `[V_S, k]` float, at least 0; a row sums to at most 1: the remaining mass is dropped
    vocab_T  size of the teacher's true vocabulary

    Computed here: `vocab_S`; `covered` `[C]`, the teacher ids with any weight, ascending; `by_T`, W
    transposed and restricted to them, and `by_S`, W restricted to them, as products.

    Raises ValueError for entries that do not fit.
    """

    ids: Tensor
    weights: Tensor
    vocab_T: int
    vocab_S: int = field(init=False)
    covered: Tensor = field(init=False)
    by_T: Bags = field(init=False)
    by_S: Bags = field(init=False)

    def __post_init__(self) -> None:
        ids, weights = self.ids, self.weights
        if ids.dim() != 2 or ids.dtype != torch.int64 or weights.shape != ids.shape:
            raise ValueError(
                "SparseMap: ids must be int64 [V_S, k] and weights of the same shape, "
                f"got {ids.dtype} {list(ids.shape)} and {list(weights.shape)}"
            )
        sums = weights.double().sum(1)
        # NaN must be refused as well.
        wrong = ~((weights >= 0).all(1) & (sums <= 1 + _ROUNDING))
        if wrong.any():
            v = int(wrong.nonzero()[0])
            raise ValueError(
                f"SparseMap: the weights of student id {v} are {weights[v].tolist()}; "
                "they must be at least 0 and sum to at most 1"
            )
        student, slot = (weights > 0).nonzero(as_tuple=True)
        teacher, weight = ids[student, slot], weights[student, slot]
        _check_range("SparseMap.ids", teacher, self.vocab_T, "the teacher's vocabulary")
        covered, column = torch.unique(teacher, return_inverse=True)
        order = column.argsort(stable=True)
        by_T = Bags.collect(student[order], weight[order], column, covered.shape[0])
        by_S = Bags.collect(column, weight, student, ids.shape[0])
        made = {"vocab_S": ids.shape[0], "covered": covered, "by_T": by_T, "by_S": by_S}
        for name, value in made.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, eq=False)
class PieceTable:
    """The student's tokens that spell each token of the teacher: `ids` int64 `[V_T, P]`, in order, then -1.

    vocab_S  size of the student's true vocabulary
    covered  computed here: the student's ids with which a teacher's token begins, ascending

    A row of -1 is a token without text. Raises ValueError for entries that do not fit.
    """

    ids: Tensor
    vocab_S: int
    covered: Tensor = field(init=False)
    _several: Mapping[int, Tensor] = field(init=False, repr=False)
    _ids_cpu: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        ids = self.ids
        if ids.dtype != torch.int64 or ids.dim() != 2 or not ids.shape[1]:
            raise ValueError(
                f"PieceTable.ids must be int64 [V_T, P], P at least 1, got {ids.dtype} {list(ids.shape)}"
            )
        _check_range("PieceTable.ids", ids, self.vocab_S, "the vocabulary, and -1 for none,", least=-1)
        if ((ids[:, :-1] < 0) & (ids[:, 1:] >= 0)).any():
            raise ValueError("PieceTable.ids: in a row, pieces must precede -1")
        begins = ids[:, 0]
        object.__setattr__(self, "covered", torch.unique(begins[begins >= 0]))
        several = (ids[:, 1] >= 0).nonzero().squeeze(1) if ids.shape[1] > 1 else ids.new_empty(0)
        by_first: dict[int, list[int]] = {}
        for token, first in zip(several.tolist(), begins[several].tolist(), strict=True):
            by_first.setdefault(first, []).append(token)
        tables = {token: torch.tensor(own) for token, own in by_first.items()}
        object.__setattr__(self, "_several", tables)
        object.__setattr__(self, "_ids_cpu", ids.cpu())

    def longer(self, tokens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the teacher's tokens that begin with these pieces and have more, and each one's next piece.

        Both are on the CPU. If they are empty, they are empty for every extension of `tokens` too.
        """
        candidates = self._several.get(tokens[0])
        if candidates is None or len(tokens) >= self.ids.shape[1]:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        rows = self._ids_cpu[candidates]
        fits = rows[:, len(tokens)] >= 0
        for position, token in enumerate(tokens[1:], start=1):
            fits = fits & (rows[:, position] == token)
        return candidates[fits], rows[fits, len(tokens)]


@dataclass(frozen=True, eq=False)
class Bags:
    """A sparse matrix by rows: row r sums `weights * x[columns]` from entry `starts[r]` on."""

    columns: Tensor
    weights: Tensor
    starts: Tensor

    @classmethod
    def collect(cls, columns: Tensor, weights: Tensor, rows: Tensor, num_rows: int) -> Bags:
        """Build from entries sorted by row."""
        counts = rows.bincount(minlength=num_rows)
        return cls(columns.contiguous(), weights.contiguous(), counts.cumsum(0) - counts)

    def times(self, matrix_cn: Tensor) -> Tensor:
        """Multiply with a dense matrix `[columns, n]` into `[rows, n]`; deterministic on every device."""
        if not self.columns.numel():
            return matrix_cn.new_zeros(self.starts.shape[0], matrix_cn.shape[1])
        return torch.nn.functional.embedding_bag(
            self.columns,
            matrix_cn,
            self.starts,
            mode="sum",
            per_sample_weights=self.weights.to(matrix_cn.dtype),
        )


def _check_range(name: str, ids: Tensor, size: int, what: str, least: int = 0) -> None:
    if ids.numel() and not least <= int(ids.min()) <= int(ids.max()) < size:
        raise ValueError(f"{name} reach from {int(ids.min())} to {int(ids.max())}, {what} is [0, {size})")
