"""Boxes of tensors: parts that have a first index and a length in every dimension. No torch.

A rank's part of a sharded tensor is a box, or a flat range that is split into boxes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Box:
    """The elements from index `start` on, `shape` of them in each dimension."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def full(cls, shape: tuple[int, ...]) -> Box:
        return cls((0,) * len(shape), shape)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def has_first(self) -> bool:
        """Whether the box has the tensor's first element: true for one of the boxes that make up a tensor."""
        return not any(self.start)

    def intersect(self, other: Box) -> Box | None:
        """Return the elements that both boxes of a tensor have; None if there are none."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(
            min(a + m, b + n)
            for a, m, b, n in zip(self.start, self.shape, other.start, other.shape, strict=True)
        )
        if any(first >= last for first, last in zip(start, stop, strict=True)):
            return None
        return Box(start, tuple(last - first for first, last in zip(start, stop, strict=True)))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Return the indices of this box in an array that has the elements of `outer`."""
        origins = (a - b for a, b in zip(self.start, outer.start, strict=True))
        return tuple(slice(first, first + n) for first, n in zip(origins, self.shape, strict=True))


def flat_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Split elements `start` to `stop` (excluded) of a tensor, in row-major order, into boxes.

    Each box is contiguous, and they are in order: of a matrix the rest of a row, whole rows, the beginning of
    a row.
    """
    if not shape and start < stop:
        yield Box((), ())
        return
    row = prod(shape[1:])
    while start < stop:
        index, inside = divmod(start, row)
        count = (stop - start) // row
        if inside == 0 and count:
            yield Box((index, *(0 for _ in shape[1:])), (count, *shape[1:]))
            start += count * row
        else:
            end = min(row, stop - index * row)
            for box in flat_boxes(shape[1:], inside, end):
                yield Box((index, *box.start), (1, *box.shape))
            start = index * row + end


def equal_part(numel: int, index: int, count: int) -> range:
    """Return the elements of part `index` of `count` nearly equal ones."""
    return range(numel * index // count, numel * (index + 1) // count)


def deal(sizes: Mapping[str, int], index: int, count: int) -> Iterator[tuple[str, range]]:
    """Deal tensors of these numbers of elements to `count` owners; yield the flat ranges of owner `index`.

    The tensors are cut as if they were joined, so that the parts are equal, and few tensors are cut.
    """
    own, position = equal_part(sum(sizes.values()), index, count), 0
    for name, numel in sizes.items():
        start, stop = max(own.start, position), min(own.stop, position + numel)
        if start < stop:
            yield name, range(start - position, stop - position)
        position += numel
