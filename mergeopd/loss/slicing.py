"""Chunk sizes and compute dtype of the loss functions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# About four such matrices exist at a time. Together they should stay in the last-level cache, and each block
# should be long enough to hide the cost of some fifty small torch calls.
_BLOCK_BYTES = 2 << 20
# Rows of a matrix product. More are not faster on a CPU. An accelerator reads the head and adds to its
# gradient once per chunk, so there a chunk's logits may take this much memory.
_CPU_ROWS = 256
_CHUNK_BYTES = 1 << 30


def compute_dtype(hidden_ND: Tensor) -> torch.dtype:
    """Float64 hidden states compute in float64, all others in float32."""
    return torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32


def rows_in_chunk(device: torch.device, vocab_size: int, dtype: torch.dtype) -> int:
    """Default number of tokens per matrix product."""
    if device.type == "cpu":
        return _CPU_ROWS
    return max(_CHUNK_BYTES // (max(vocab_size, 1) * dtype.itemsize), _CPU_ROWS)


def rows_in_cache(vocab_size: int, dtype: torch.dtype) -> int:
    """Rows of a block whose matrices stay in a processor's cache."""
    return max(_BLOCK_BYTES // (max(vocab_size, 1) * dtype.itemsize), 1)


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """The range in steps; the last may be shorter."""
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))
