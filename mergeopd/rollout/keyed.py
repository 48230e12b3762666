"""Uniform random numbers keyed by seed, prompt, sample and position.

They do not depend on the batch of a sequence, the order of calls, or restarts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def stream_key(seed: int, prompt_key: str, sample: int) -> int:
    """Return the 64-bit key of one sequence's random stream."""
    digest = hashlib.blake2b(f"{seed}\0{prompt_key}\0{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniforms(keys: Sequence[int], num_positions: int) -> NDArray[np.float64]:
    """Return numbers `[len(keys), num_positions]` in [0, 1) with 48 random bits each.

    The generator is SplitMix64, started at the key (Steele, Lea and Flood 2014). With 48 bits, the product of
    the largest number and a float64 total is not rounded up to the total.
    """
    state = np.asarray(keys, dtype=np.uint64)[:, None]
    step = np.arange(1, num_positions + 1, dtype=np.uint64)[None, :]
    with np.errstate(over="ignore"):
        z = state + step * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    numbers: NDArray[np.float64] = (z >> np.uint64(16)).astype(np.float64) * 2.0**-48
    return numbers
