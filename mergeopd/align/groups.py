"""Group tokens that cover the same bytes: a group closes where tokens of both sides end at one position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Ends:
    """End positions of the tokens of R texts, on one side.

    Token n of text r, `rows[r] <= n < rows[r + 1]`, ends at `ends[n]`, counted from the start of the text.
    Ends do not decrease within a text.
    """

    ends: Ints  # [N]
    rows: Ints  # [R + 1]


@dataclass(frozen=True, slots=True, eq=False)
class Closed:
    """G groups in order: tokens `starts[g]` to `stops[g] - 1` of each side, in text `row[g]`."""

    row: Ints  # [G]
    student_starts: Ints
    student_stops: Ints
    teacher_starts: Ints
    teacher_stops: Ints


def close_groups(student: Ends, teacher: Ends, limits: Ints) -> Closed:
    """Cut texts wherever a token of both sides ends, in linear time and without a loop over tokens.

    `limits` `[R]`: the last position of each text at which a group may close. A token that ends where the one
    before it does, such as a space that encoding put there, belongs to the group of the token after it.
    Tokens behind the last common end are in no group. Only bytes are compared, never decoded strings, so
    pieces of one character, different cuts of a number and a BOS on one side are no special cases (TRL issues
    4392 and 4393 are about aligners that decode).
    """
    bases = np.zeros(len(limits) + 1, np.int64)
    np.cumsum(limits + 1, out=bases[1:])
    ends, may_close = zip(*(_positions(side, bases, limits) for side in (student, teacher)), strict=True)
    stops = _common(ends, may_close, int(bases[-1]))
    row = np.searchsorted(bases, ends[0][stops[0] - 1], side="right") - 1
    starts = []
    for side, stop in zip((student, teacher), stops, strict=True):
        before = np.zeros_like(stop)
        before[1:] = stop[:-1]
        starts.append(np.maximum(before, side.rows[row]))
    return Closed(row, starts[0], stops[0], starts[1], stops[1])


def _positions(side: Ends, bases: Ints, limits: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """Return ends counted from the start of all texts, and whether a group may close there."""
    lengths = np.diff(side.rows)
    before = np.zeros_like(side.ends)
    before[1:] = side.ends[:-1]
    before[side.rows[:-1][lengths > 0]] = 0
    may_close = side.ends > before
    may_close &= side.ends <= np.repeat(limits, lengths)
    return side.ends + np.repeat(bases[:-1], lengths), may_close


def _common(ends: tuple[Ints, ...], may_close: tuple[NDArray[np.bool_], ...], size: int) -> tuple[Ints, Ints]:
    """Return, for each side, one past the tokens that end where a token of the other side does."""
    marked = np.zeros(size, bool)
    marked[ends[1][may_close[1]]] = True
    closing = may_close[0].copy()
    closing[closing] = marked[ends[0][closing]]
    marked[:] = False
    marked[ends[0][closing]] = True
    other = may_close[1].copy()
    other[other] = marked[ends[1][other]]
    return np.flatnonzero(closing) + 1, np.flatnonzero(other) + 1
