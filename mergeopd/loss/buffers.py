"""Scratch buffers that are reused over calls, so that their pages are faulted in once."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


class Workspace:
    """Named scratch memory of `fused_loss`, owned by the caller and handed in at every call.

    On a CPU the allocator gives large blocks back to the system, and faulting them in again costs more than
    the exponentials that are written into them. Contents do not survive a call; one call at a time.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised tensor of `shape`; the same name gives the same memory, grown on demand."""
        size = prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype or buffer.device != device:
            # Drop the old buffer first, so that both never exist at the same time.
            self._buffers.pop(name, None)
            del buffer
            buffer = self._buffers[name] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(shape)

    @property
    def num_bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())
