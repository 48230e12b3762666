"""Match the tokens of two vocabularies, and project each of the student's onto the teacher's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mergeopd.align.encoding import ByteTokenizer
from mergeopd.align.responses import EndTokens
from mergeopd.align.token_bytes import ADDED, BYTE, TEXT, TokenBytes
from mergeopd.errors import TokenizerError

Ints = NDArray[np.int64]
FORMAT = "mergeopd-vocabulary-map-2"
_TEXT_KINDS = (TEXT, ADDED, BYTE)


# Each piece of a token weighs a tenth of the one before it (X-Token, 2605.21699).
_DECAY = 0.1


def made_for(student: TokenBytes, teacher: TokenBytes, ends: EndTokens, k: int) -> str:
    """Describe everything that a map depends on, as one line of JSON; rows have `k` weights."""
    facts = {
        "format": FORMAT,
        "student": student.fingerprint,
        "teacher": teacher.fingerprint,
        "ends": [list(ends.student), ends.teacher],
        "k": k,
    }
    return json.dumps(facts, sort_keys=True)


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """A mapping between two vocabularies by the bytes of tokens, not by their strings.

    `student_ids[m]` and `teacher_ids[m]` have the same bytes, or both are end tokens; ids are unique. Row s
    of the projection distributes the student's token s over the teacher's tokens: `projection_weights[s]`
    sums to 1, or is all 0 for special and unused ids. Unused columns have id 0 and weight 0.
    """

    made_for: str
    student_ids: Ints  # [M], ascending
    teacher_ids: Ints  # [M]
    projection_ids: Ints  # [V_S, k]
    projection_weights: NDArray[np.float32]  # [V_S, k], descending in a row

    @classmethod
    def build(
        cls, student: ByteTokenizer, teacher: ByteTokenizer, ends: EndTokens, k: int = 4
    ) -> VocabularyMap:
        """Match tokens by bytes, then encode the rest of each vocabulary with the other tokenizer (X-Token).

        A token that both have has weight 1. Any other token of the student is encoded with the teacher's
        tokenizer, as a continuation, and its weight is split among the pieces, each a tenth of the one
        before; parts of characters are split into bytes. A token that only the teacher has is encoded with
        the student's tokenizer and adds to the rows of its pieces. The `k` largest weights are kept. The
        student's end tokens map to the teacher's; the first of them is matched with it.

        Raises ValueError when `k` is below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        matched = _matched(student.tokens, teacher.tokens, ends)
        pinned = _same_tokens(student.tokens, teacher.tokens)
        pinned[list(ends.student)] = ends.teacher
        known = pinned >= 0
        only_teacher = np.setdiff1d(np.arange(len(teacher.tokens)), list(matched.values()))
        own, other, weights = _pieces_of(student.tokens, teacher, np.flatnonzero(~known))
        other_2, own_2, weights_2 = _pieces_of(teacher.tokens, student, only_teacher)
        own, other = np.concatenate([own, own_2]), np.concatenate([other, other_2])
        weights, free = np.concatenate([weights, weights_2]), ~known[own]
        shape = len(student.tokens), len(teacher.tokens)
        ids, shares = _largest(own[free], other[free], weights[free], *shape, k)
        ids[known, 0], shares[known, 0] = pinned[known], 1.0
        student_ids = np.array(sorted(matched), np.int64)
        teacher_ids = np.array([matched[i] for i in student_ids.tolist()], np.int64)
        made = made_for(student.tokens, teacher.tokens, ends, k)
        return cls(made, student_ids, teacher_ids, ids, shares)

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        from safetensors.numpy import save_file

        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        save_file(arrays, str(path), metadata={"format": FORMAT, "made_for": self.made_for})

    @classmethod
    def load(cls, path: Path, made_for: str, student: TokenBytes, teacher: TokenBytes) -> VocabularyMap:
        """Read a file that `save` wrote.

        Raises TokenizerError when it is damaged, or was made for other tokenizers, revisions or end tokens.
        """
        from safetensors import SafetensorError, safe_open

        remedy = "delete it to have it rebuilt"
        try:
            with safe_open(str(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        except (OSError, SafetensorError) as error:
            raise TokenizerError(f"{path}: not a vocabulary map: {error}; {remedy}") from error
        if metadata.get("format") != FORMAT or arrays.keys() != set(_ARRAYS):
            raise TokenizerError(f"{path}: not a vocabulary map of this version ({FORMAT}); {remedy}")
        if metadata.get("made_for") != made_for:
            raise TokenizerError(
                f"{path}: made for other tokenizers than {student.name} and {teacher.name}, or other "
                f"revisions or end tokens of them; {remedy}"
            )
        return cls(made_for, **arrays)


_ARRAYS = tuple(field.name for field in fields(VocabularyMap) if field.name != "made_for")


def _matched(student: TokenBytes, teacher: TokenBytes, ends: EndTokens) -> dict[int, int]:
    """Pair student ids with teacher ids, one to one."""
    end_ids = set(ends.student)
    pairs = {ends.student[0]: ends.teacher} if ends.student else {}
    for piece, i in student.ids.items():
        other = teacher.ids.get(piece)
        if other is not None and other != ends.teacher and i not in end_ids:
            pairs[i] = other
    return pairs


def _same_tokens(tokens: TokenBytes, other: TokenBytes) -> Ints:
    """Return for each token with text the other side's id of the same bytes; -1 where there is none."""
    ids = np.full(len(tokens), -1, np.int64)
    for i in np.flatnonzero(np.isin(tokens.kind, _TEXT_KINDS)).tolist():
        ids[i] = other.ids.get(tokens.pieces[i], -1)
    return ids


def _pieces_of(tokens: TokenBytes, other: ByteTokenizer, ids: Ints) -> tuple[Ints, Ints, NDArray[np.float64]]:
    """Encode each of `ids` that has text with the other tokenizer: source, target, weight."""
    sources = ids[np.isin(tokens.kind[ids], _TEXT_KINDS)].tolist()
    texts: dict[int, str] = {}
    for i in sources:
        with suppress(UnicodeDecodeError):  # part of a character
            texts[i] = tokens.pieces[i].decode()
    cut: dict[int, Sequence[int]] = dict(zip(texts, other.encode_inside(list(texts.values())), strict=True))
    pieces = other.tokens.pieces
    for i in sources:
        # A tokenizer that normalises, or has an unknown token, may encode other bytes.
        if i not in cut or b"".join(pieces[j] for j in cut[i]) != tokens.pieces[i]:
            cut[i] = _bytewise(tokens.pieces[i], other.tokens.ids)
    lengths = np.fromiter((len(cut[i]) for i in sources), np.int64, len(sources))
    ends = np.cumsum(lengths)
    position = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
    weights = _DECAY ** position.astype(np.float64)
    totals = (1 - _DECAY**lengths) / (1 - _DECAY)
    targets = np.fromiter(chain.from_iterable(cut[i] for i in sources), np.int64, len(position))
    return np.repeat(np.array(sources, np.int64), lengths), targets, weights / np.repeat(totals, lengths)


def teacher_pieces(student: ByteTokenizer, teacher: TokenBytes, ends: EndTokens) -> Ints:
    """Return `[V_T, P]`: the student's tokens for each of the teacher's, as a continuation, padded with -1.

    A token that the student has too is one piece; the teacher's end token is the student's. Rows of special
    and unused tokens, and of those that the student cannot encode, are all -1.
    """
    rows, columns, _ = _pieces_of(teacher, student, np.arange(len(teacher)))
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    table = np.full((len(teacher), int(rank.max(initial=0)) + 1), -1, np.int64)
    table[rows, rank] = columns
    same = _same_tokens(teacher, student.tokens)
    same[ends.teacher] = ends.student[0] if ends.student else -1
    is_one = same >= 0
    is_one[ends.teacher] = True
    table[is_one], table[is_one, 0] = -1, same[is_one]
    return table


def _bytewise(piece: bytes, ids: Mapping[bytes, int]) -> list[int]:
    """Return one token per byte, or none where a byte has no token, since part of a token is another one."""
    tokens = [ids.get(piece[at : at + 1]) for at in range(len(piece))]
    return [i for i in tokens if i is not None] if None not in tokens else []


def _largest(
    rows: Ints, columns: Ints, weights: NDArray[np.float64], num_rows: int, num_columns: int, k: int
) -> tuple[Ints, NDArray[np.float32]]:
    """Keep the k largest weights of each row and normalise them; weights of one column are added."""
    places, inverse = np.unique(rows * num_columns + columns, return_inverse=True)
    sums = np.bincount(inverse, weights, len(places))
    row, column = places // num_columns, places % num_columns
    order = np.lexsort((column, -sums, row))
    row, column, sums = row[order], column[order], sums[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    kept = rank < k
    row, column, sums, rank = row[kept], column[kept], sums[kept], rank[kept]
    ids, shares = np.zeros((num_rows, k), np.int64), np.zeros((num_rows, k), np.float32)
    ids[row, rank] = column
    shares[row, rank] = sums / np.bincount(row, sums, num_rows)[row]
    return ids, shares
