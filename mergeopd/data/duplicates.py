"""Find prompts that equal or nearly equal an earlier one.

Near duplicates are prompts whose sets of 5 characters have a high Jaccard similarity. Candidates come from
MinHash signatures in bands (Broder 1997; Leskovec et al., Mining of Massive Datasets, ch. 3), and every
candidate is compared exactly, so that hashing decides only which pairs are compared.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mergeopd.types import Prompt

_SHINGLE = 5
# With 32 bands of 4 hashes, a pair of similarity 0.5 is missed with probability (1 - 0.5^4)^32 = 0.13, one of
# 0.7 with 2e-4, one of 0.8 with 5e-8.
_BANDS, _ROWS = 32, 4
_RANDOM = np.random.Generator(np.random.PCG64(20)).integers(0, 1 << 63, (2, _BANDS * _ROWS), dtype=np.uint64)
_SHIFT = np.uint64(32)


def normal_text(prompt: Prompt) -> str:
    """Return the text of a prompt's messages, in lower case and with single spaces."""
    parts = [f"{message.role}: {message.content}" for message in prompt.messages]
    return " ".join(" ".join(parts).casefold().split())


def duplicates(texts: Sequence[str], similarity: float | None) -> dict[int, int]:
    """Return the text that each duplicate duplicates, both by index: the first that is kept.

    `similarity` is the least Jaccard similarity of near duplicates; None: only equal texts.
    """
    first: dict[str, int] = {}
    twins: dict[int, int] = {}
    for index, text in enumerate(texts):
        if (earlier := first.setdefault(text, index)) != index:
            twins[index] = earlier
    if similarity is None:
        return twins
    buckets: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)
    kept: dict[int, frozenset[int]] = {}
    for index in first.values():
        own = _shingles(texts[index])
        places = list(enumerate(_bands(own)))
        candidates = sorted({other for place in places for other in buckets[place]})
        twin = next((other for other in candidates if _jaccard(own, kept[other]) >= similarity), None)
        if twin is not None:
            twins[index] = twin
            continue
        kept[index] = own
        for place in places:
            buckets[place].append(index)
    return twins


def _shingles(text: str) -> frozenset[int]:
    """Return the hashes of all runs of 5 characters; of the whole text if it is shorter."""
    runs = [text[i : i + _SHINGLE] for i in range(max(1, len(text) - _SHINGLE + 1))]
    digests = (hashlib.blake2b(run.encode(), digest_size=8).digest() for run in set(runs))
    return frozenset(int.from_bytes(digest, "little") for digest in digests)


def _bands(shingles: frozenset[int]) -> list[bytes]:
    """Return the parts of a MinHash signature that near duplicates are likely to share."""
    hashes = np.fromiter(shingles, np.uint64, len(shingles))
    factors, offsets = _RANDOM[0] | np.uint64(1), _RANDOM[1]
    with np.errstate(over="ignore"):
        mixed: NDArray[np.uint64] = (hashes[:, None] * factors + offsets) >> _SHIFT
    return [band.tobytes() for band in mixed.min(0).reshape(_BANDS, _ROWS)]


def _jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    return len(one & other) / len(one | other)
