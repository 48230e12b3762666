"""Map positions in the normal form of a text to the text itself, for tokenizers that normalise."""

from __future__ import annotations

import sys
import unicodedata
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mergeopd.align.inversion import NormalForm
from mergeopd.align.token_bytes import offsets_of

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Normalised:
    """A text in a Unicode normal form, with the positions (in bytes) that both texts have in common.

    Positions are counted double, so that inside a stretch that normalisation changed there is an odd one,
    which no position of the text itself equals.
    """

    content: bytes
    _own: Ints  # [B] positions in the text
    _normal: Ints  # [B] the same positions in the normal form
    _same: NDArray[np.bool_]  # [B - 1] whether the stretch after a position is unchanged

    def places(self, ends: Ints) -> Ints:
        """Return doubled positions in the text for positions in the normal form."""
        behind = np.searchsorted(self._normal, ends, side="right") - 1
        offsets = ends - self._normal[behind]
        same = np.append(self._same, True)[behind]
        inside = np.where(same, 2 * offsets, 1)
        return 2 * self._own[behind] + np.where(offsets > 0, inside, 0)


def normalised(text: str, form: NormalForm) -> Normalised:
    """Normalise `text` in stretches whose characters do not interact with those of other stretches.

    A stretch ends before a character whose full decomposition begins with one that is neither reordered nor
    composed with a character before it (Unicode Standard Annex 15, normalization contexts).
    """
    cuts = [i for i, character in enumerate(text) if i == 0 or _begins(character, form)]
    stretches = [text[a:b] for a, b in pairwise([*cuts, len(text)])]
    normal = [unicodedata.normalize(form, stretch) for stretch in stretches]
    return Normalised(
        "".join(normal).encode(),
        offsets_of([len(stretch.encode()) for stretch in stretches]),
        offsets_of([len(stretch.encode()) for stretch in normal]),
        np.array([a == b for a, b in zip(stretches, normal, strict=True)], bool),
    )


def _begins(character: str, form: NormalForm) -> bool:
    if character < "\u0300":
        return True
    first = unicodedata.normalize("NFKD" if "K" in form else "NFD", character)[0]
    return unicodedata.combining(first) == 0 and first not in _joining()


@cache
def _joining() -> frozenset[str]:
    """Return the characters that can be composed with the one before them."""
    jamo = {chr(code) for code in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}
    decompositions = (unicodedata.decomposition(chr(code)) for code in range(sys.maxunicode + 1))
    pairs = (parts.split() for parts in decompositions if parts and not parts.startswith("<"))
    return frozenset(jamo | {chr(int(pair[1], 16)) for pair in pairs if len(pair) == 2})
