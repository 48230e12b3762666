"""Objects as bytes between the processes of a run, and the choice of the collective that moves them.

Importing this does not import torch.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Bytes of the first message of an object, in which small objects travel whole.
HEAD_BYTES = 1024
_SIZE_BYTES = 8
_ALIGNMENT = 8


@dataclass(frozen=True)
class Packed:
    """An object as bytes: an index with its pickle, and the contents of its numpy arrays, not copied."""

    index: bytes
    arrays: Sequence[memoryview]

    @classmethod
    def of(cls, value: Any) -> Packed:
        buffers: list[pickle.PickleBuffer] = []
        rest = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        arrays = [buffer.raw() for buffer in buffers]
        index = pickle.dumps((rest, [array.nbytes for array in arrays]), protocol=5)
        return cls(len(index).to_bytes(_SIZE_BYTES) + index, arrays)

    @property
    def num_bytes(self) -> int:
        return sum(_aligned(part.nbytes) for part in self._parts)

    @property
    def head(self) -> bytes:
        """The size, and the beginning of the bytes: all of them, if they fit."""
        import numpy as np

        start = np.zeros(HEAD_BYTES - _SIZE_BYTES, np.uint8)
        self.copy_to(start, 0)
        return self.num_bytes.to_bytes(_SIZE_BYTES) + start.tobytes()

    def copy_to(self, target: NDArray[np.uint8], start: int) -> None:
        """Copy the bytes from `start` on, as many as `target` has; what is behind the end is not changed."""
        import numpy as np

        position = -start
        for part in self._parts:
            low, high = max(position, 0), min(position + part.nbytes, len(target))
            if low < high:
                target[low:high] = np.frombuffer(part, np.uint8)[low - position : high - position]
            position += _aligned(part.nbytes)

    def own(self) -> Any:
        """Return the object with this process's own arrays, read-only."""
        return _loaded(memoryview(self.index), [array.toreadonly() for array in self.arrays])

    @property
    def _parts(self) -> tuple[memoryview, ...]:
        return (memoryview(self.index), *self.arrays)


def size_of(head: bytes) -> int:
    """Return the number of bytes that must follow a head; 0 where it contains the object."""
    size = int.from_bytes(head[:_SIZE_BYTES])
    return size if size > HEAD_BYTES - _SIZE_BYTES else 0


def unpacked(content: memoryview) -> Any:
    """Return the object of another process of this run from its bytes; arrays are read-only views of them."""
    content = content.toreadonly()
    return _loaded(content, content)


def unpacked_head(head: bytes) -> Any:
    """Return the object that a head contains."""
    return unpacked(memoryview(head)[_SIZE_BYTES:])


def _loaded(index: memoryview, arrays: memoryview | Sequence[memoryview]) -> Any:
    """Unpickle an object of this run, with its arrays or the bytes in which they follow the index."""
    end = _SIZE_BYTES + int.from_bytes(index[:_SIZE_BYTES])
    rest, sizes = pickle.loads(index[_SIZE_BYTES:end])  # noqa: S301 - from a process of this run
    if isinstance(arrays, memoryview):
        starts = accumulate(map(_aligned, sizes), initial=_aligned(end))
        arrays = [arrays[start : start + size] for start, size in zip(starts, sizes, strict=False)]
    return pickle.loads(rest, buffers=arrays)  # noqa: S301


@dataclass(frozen=True)
class Step:
    """One collective: bytes `start` to `start + num_bytes` of `sender`, or of every process if it is None."""

    sender: int | None
    start: int
    num_bytes: int


def steps(sizes: Sequence[int], part_bytes: int) -> Iterator[Step]:
    """Yield the collectives after which every process has `sizes[rank]` bytes of every other one.

    Either all send parts of equal size at once, so that shorter contents are padded to the longest, or one
    after the other sends to all, along a tree whose depth multiplies the time. No collective moves more than
    about `part_bytes`, which is the memory needed beside the contents.
    """
    senders = [rank for rank, size in enumerate(sizes) if size]
    if not senders:
        return
    largest = max(sizes)
    if len(sizes) * largest <= sum(sizes) * len(sizes).bit_length():
        part = max(_ALIGNMENT, part_bytes // len(sizes) // _ALIGNMENT * _ALIGNMENT)
        yield from (Step(None, start, min(part, largest - start)) for start in range(0, largest, part))
        return
    for sender in senders:
        for start in range(0, sizes[sender], part_bytes):
            yield Step(sender, start, min(part_bytes, sizes[sender] - start))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
