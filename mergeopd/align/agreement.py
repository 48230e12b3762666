"""Find how far the bytes of a teacher's tokens agree with the text that they encode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergeopd.align.normal import normalised
from mergeopd.align.token_bytes import ADDED, TokenBytes

Ints = NDArray[np.int64]
_SPACE = 0x20


@dataclass(frozen=True, slots=True, eq=False)
class Agreement:
    """End positions of the teacher's tokens in the student's text, and the last position of agreement.

    Positions are byte offsets times `scale`: 2 for a text that was normalised, so that inside a stretch that
    normalisation changed there is an odd position, at which no token of the student can end. `whole`: all of
    the text agrees. `num_before`: bytes of the first token that encoding put before the text.
    """

    ends: Ints  # [tokens with bytes]
    limit: int
    scale: int
    whole: bool
    num_before: int


def agreement(text: str, ids: Sequence[int], teacher: TokenBytes) -> Agreement:
    """Compare a text with the bytes of its tokens, where these are not simply equal.

    Tokens agree up to the first byte that differs from the text's normal form, and before the first token
    without bytes (unknown or special), which can replace any part of the text. Tokenizers that
    put a space before every piece of text between added tokens are read with and without these.
    """
    own = text.encode()
    form = None if teacher.normal is None else normalised(text, teacher.normal)
    expected = np.frombuffer(own if form is None else form.content, np.uint8)
    ids_T = np.array(ids, np.int64)
    readings = [
        (*_compared(expected, ids_T, widths, teacher), num_before)
        for widths, num_before in _readings(ids_T, teacher)
    ]
    ends, common, whole, num_before = max(readings, key=lambda reading: reading[1])
    ends = ends[teacher.widths[ids_T] > 0]
    if form is None:
        return Agreement(ends, common, 1, whole, num_before)
    limit = int(form.places(np.array([common]))[0])
    return Agreement(form.places(ends), limit, 2, whole, num_before)


def _readings(ids: Ints, teacher: TokenBytes) -> Iterator[tuple[Ints, int]]:
    """Yield the widths of tokens in bytes, without spaces that encoding may have put before them.

    Each comes with the number of bytes that were removed before the text.
    """
    widths = teacher.widths[ids]
    yield widths, 0
    if not teacher.prefix or not len(ids):
        return
    wide = np.flatnonzero(widths)
    begins = np.zeros(len(ids), bool)
    begins[wide] = teacher.flat[teacher.starts[ids[wide]]] == _SPACE
    begins &= teacher.kind[ids] != ADDED
    after_added = np.concatenate([[True], teacher.kind[ids[:-1]] == ADDED])
    first = np.arange(len(ids)) == 0
    yield widths - (begins & first), int(begins[0])
    yield widths - (begins & after_added), int(begins[0])


def _compared(
    expected: NDArray[np.uint8], ids: Ints, widths: Ints, teacher: TokenBytes
) -> tuple[Ints, int, bool]:
    """Return the ends of the tokens, the number of bytes that agree, and whether all do."""
    ends = np.cumsum(widths)
    full = teacher.widths[ids]
    removed = (np.cumsum(full) - full)[widths < full]
    given = np.delete(teacher.joined(ids), removed)
    length = min(len(given), len(expected))
    differing = given[:length] != expected[:length]
    common = int(differing.argmax()) if differing.any() else length
    whole = common == len(given) == len(expected)
    without_bytes = np.flatnonzero(full == 0)
    if len(without_bytes):
        common, whole = min(common, int(ends[without_bytes[0]])), False
    return ends, common, whole
