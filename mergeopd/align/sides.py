"""The tokens of one side that stand for text: where they are, where they end, what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from mergeopd.align.token_bytes import TokenBytes
from mergeopd.errors import TokenizerError

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """R answers in the tokens of one side. Of their tokens, those that stand for text or end an answer count.

    Token n of answer r, `rows[r] <= n < rows[r + 1]`, is number `where[n]` of all tokens of its answer and
    ends at byte `ends[n]` of it. The bytes of answer r are `content[byte_rows[r]:byte_rows[r + 1]]`. An end
    token (`ended`) has no bytes and comes last.
    """

    lengths: Ints  # [R] all tokens
    ended: NDArray[np.bool_]  # [R]
    where: Ints  # [N]
    ends: Ints  # [N]
    rows: Ints  # [R + 1]
    content: bytes
    byte_rows: list[int]  # [R + 1]

    @classmethod
    def of(cls, answers: Sequence[Sequence[int]], ended: Sequence[bool], tokens: TokenBytes) -> Side:
        """Look all tokens up; `ended` tells whose last token is an end token, of whatever kind it is.

        Raises:
            TokenizerError: an id is not in the tokenizer.
        """
        lengths = np.fromiter(map(len, answers), np.int64, len(answers))
        ids = np.fromiter(chain.from_iterable(answers), np.int64, int(lengths.sum()))
        _refuse_strangers(ids, tokens)
        offsets = _running(lengths)
        with_end = np.array(ended, bool)
        end_tokens = offsets[1:][with_end] - 1
        widths = tokens.widths[ids]
        widths[end_tokens] = 0
        counted = widths > 0
        content = tokens.joined(ids[counted])
        counted[end_tokens] = True
        rows = _running(counted)[offsets]
        ends = np.cumsum(widths)
        byte_rows = np.concatenate([[0], ends])[offsets]
        where, before = np.flatnonzero(counted), np.diff(rows)
        return cls(
            lengths,
            with_end,
            where - np.repeat(offsets[:-1], before),
            ends[where] - np.repeat(byte_rows[:-1], before),
            rows,
            content.tobytes(),
            byte_rows.tolist(),
        )

    def bytes_of(self, row: int) -> bytes:
        """What the tokens of one answer stand for."""
        return self.content[self.byte_rows[row] : self.byte_rows[row + 1]]

    @property
    def last(self) -> Ints:
        """The tokens that end an answer."""
        return self.rows[1:][self.ended] - 1


def _running(lengths: NDArray[np.generic]) -> Ints:
    total = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=total[1:])
    return total


def _refuse_strangers(ids: Ints, tokens: TokenBytes) -> None:
    if len(ids) and not 0 <= ids.min() <= ids.max() < len(tokens):
        stranger = ids[(ids < 0) | (ids >= len(tokens))][0]
        raise TokenizerError(
            f"{tokens.name}: an answer has the token {stranger}, but ids end at {len(tokens) - 1}; it was "
            "written with another tokenizer, or by a head with more rows than there are tokens"
        )
