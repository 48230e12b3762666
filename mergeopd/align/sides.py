"""Look up the tokens of one side that have text: their positions, where they end, their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergeopd.align.token_bytes import TokenBytes, offsets_of
from mergeopd.errors import TokenizerError

Ints = NDArray[np.int64]
TokenRow: TypeAlias = Sequence[int] | NDArray[np.integer]


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """R responses in the tokens of one side: only tokens that have text or end a response are listed.

    Token n of response r, `rows[r] <= n < rows[r + 1]`, has position `where[n]` among all tokens of its
    response and ends at byte `ends[n]` of it. The bytes of response r are
    `content[byte_rows[r]:byte_rows[r + 1]]`. An end token (`ended`) has no bytes and comes last.
    """

    lengths: Ints  # [R] all tokens
    ended: NDArray[np.bool_]  # [R]
    where: Ints  # [N]
    ends: Ints  # [N]
    rows: Ints  # [R + 1]
    content: bytes
    byte_rows: list[int]  # [R + 1]

    @classmethod
    def of(cls, responses: Sequence[TokenRow], ended: Sequence[bool], tokens: TokenBytes) -> Side:
        """Look up all tokens. `ended`: the last token of a response is an end token, of whatever kind.

        Raises TokenizerError when an id is not in the tokenizer.
        """
        lengths = np.fromiter(map(len, responses), np.int64, len(responses))
        ids = np.concatenate([np.zeros(0, np.int64), *(np.asarray(row, np.int64) for row in responses)])
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(tokens):
            unknown = ids[(ids < 0) | (ids >= len(tokens))][0]
            raise TokenizerError(
                f"{tokens.name}: a response has the token {unknown}, but ids end at {len(tokens) - 1}; it "
                "was generated with another tokenizer, or by a head with more rows than there are tokens"
            )
        offsets = offsets_of(lengths)
        with_end = np.array(ended, bool)
        end_tokens = offsets[1:][with_end] - 1
        widths = tokens.widths[ids]
        widths[end_tokens] = 0
        counted = widths > 0
        content = tokens.joined(ids[counted])
        counted[end_tokens] = True
        rows = offsets_of(counted)[offsets]
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
        """Return the bytes of one response."""
        return self.content[self.byte_rows[row] : self.byte_rows[row + 1]]

    @property
    def last(self) -> Ints:
        """The end tokens, as indices."""
        return self.rows[1:][self.ended] - 1
