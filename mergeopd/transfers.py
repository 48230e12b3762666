"""Copies between main memory and an accelerator that do not wait for the work in its queue."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    def synchronize(self) -> None: ...


def host_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised tensor in main memory, from which `to_device` copies without another copy."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to `device`; from main memory to an accelerator, the host does not wait."""
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    # The allocator of pinned memory gives a block out again only when the copies from it have ended.
    return values.pin_memory().to(device, non_blocking=True)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors of one device and dtype to main memory as one: the host waits once."""
    if not tensors:
        return []
    joined = torch.cat([tensor.reshape(-1) for tensor in tensors]).cpu()
    parts = torch.split(joined, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class Outbox:
    """Copies tensors to main memory in the background, and hands each over, in order, when it is there.

    At most `limit_bytes` are under way, or one tensor. A tensor that is already in main memory is handed over
    at once, and not copied.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._under_way: deque[tuple[Tensor, Event, Callable[[Tensor], None]]] = deque()
        self._num_bytes = 0

    def send(self, tensor: Tensor, keep: Callable[[Tensor], None]) -> None:
        """Begin to copy `tensor`; `keep` gets the copy, pinned and not used again, during a later call."""
        started = _started(tensor)
        if started is None:
            self.flush()
            keep(tensor.cpu())
            return
        self._under_way.append((*started, keep))
        self._num_bytes += tensor.nbytes
        while self._num_bytes > self._limit_bytes and len(self._under_way) > 1:
            self._hand_over()

    def flush(self) -> None:
        """Wait for all copies and hand them over."""
        while self._under_way:
            self._hand_over()

    def clear(self) -> None:
        """Forget the copies that were not handed over."""
        self._under_way.clear()
        self._num_bytes = 0

    def _hand_over(self) -> None:
        copy, event, keep = self._under_way.popleft()
        self._num_bytes -= copy.nbytes
        event.synchronize()
        keep(copy)


def _started(tensor: Tensor) -> tuple[Tensor, Event] | None:
    """Begin a copy behind the work that makes `tensor`; None where there is no queue to wait for."""
    if not tensor.is_cuda:
        return None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    # In the same queue: its memory can be used again by what follows, and the copy is short beside a pass.
    return copy, torch.cuda.current_stream(tensor.device).record_event()
