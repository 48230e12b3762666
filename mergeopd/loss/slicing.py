"""Chunk sizes and compute dtype of the loss functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# About three such matrices exist at a time. They should stay in a core's second-level cache, and each block
# should be long enough to hide the cost of some thirty small torch calls.
_BLOCK_BYTES = 1 << 20
# Rows of a matrix product. More are not faster on a CPU. An accelerator reads the head and adds to its
# gradient once per chunk, so there a chunk's logits may take this much memory.
_CPU_ROWS = 256
_CHUNK_BYTES = 1 << 30

# With the Triton kernels: memory of all models' logits, and of the logit gradient of several such chunks. The
# head's gradient, [V, d] in float32, is read and written once per product, so these products take many rows.
_LOGITS_BYTES, _GRADIENT_BYTES = 3 << 27, 9 << 26
_ROW_MULTIPLE = 64


@dataclass(frozen=True)
class ChunkPlan:
    """Tokens of one projection to logits, of one product with the logit gradient, and of one block of scores.

    `in_place`: the logit gradient overwrites the student's logits; `gradient_rows` then equals `rows`.
    """

    rows: int
    gradient_rows: int
    block_rows: int
    in_place: bool

    @classmethod
    def of_torch(
        cls, device: torch.device, vocab_size: int, dtype: torch.dtype, rows: int | None
    ) -> ChunkPlan:
        """Plan chunks of `rows` (None: by device) for torch operations, in blocks that fit a CPU's cache."""
        if rows is None:
            rows = rows_in_chunk(device, vocab_size, dtype)
        block_rows = rows_in_cache(vocab_size, dtype) if device.type == "cpu" else rows
        return cls(rows, rows, block_rows, in_place=True)

    @classmethod
    def of_triton(
        cls, num_models: int, vocab_size: int, dtype: torch.dtype, operand: torch.dtype, rows: int | None
    ) -> ChunkPlan:
        """Plan chunks of `rows` (None: by memory) for the Triton kernels."""
        row_bytes = max(vocab_size, 1) * dtype.itemsize * num_models
        if rows is None:
            rows = max(_LOGITS_BYTES // row_bytes // _ROW_MULTIPLE, 1) * _ROW_MULTIPLE
        chunks = max(_GRADIENT_BYTES // (max(vocab_size, 1) * operand.itemsize) // max(rows, 1), 1)
        return cls(rows, rows * chunks, rows, in_place=False)


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
    return max(torch.get_num_threads() * _BLOCK_BYTES // (max(vocab_size, 1) * dtype.itemsize), 1)


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """The range in steps; the last may be shorter."""
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))
