"""Boxes of flat ranges and of dealt tensors, against numpy's own flat order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeopd.storage.boxes import Box, deal, flat_boxes

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@given(SHAPES, st.data())
def test_a_flat_range_is_split_into_few_contiguous_boxes_in_order(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    numbers = np.arange(int(np.prod(shape, dtype=int))).reshape(shape)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, numbers.size)] * 2)))
    boxes = list(flat_boxes(shape, start, stop))
    elements = [numbers[box.within(Box.full(shape))].ravel() for box in boxes]
    assert [box.numel for box in boxes] == [len(values) for values in elements]
    assert np.concatenate([np.zeros(0, int), *elements]).tolist() == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@given(SHAPES, st.data())
def test_boxes_intersect_as_their_indices_do(shape: tuple[int, ...], data: st.DataObject) -> None:
    def drawn() -> Box:
        start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
        return Box(start, tuple(data.draw(st.integers(1, n - s)) for n, s in zip(shape, start, strict=True)))

    a, b, whole = drawn(), drawn(), Box.full(shape)
    numbers = np.arange(whole.numel).reshape(shape)
    expected = np.intersect1d(numbers[a.within(whole)], numbers[b.within(whole)])
    common = a.intersect(b)
    assert (common is None) == (len(expected) == 0)
    if common is not None:
        assert numbers[a.within(whole)][common.within(a)].ravel().tolist() == expected.tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
def test_tensors_are_dealt_in_equal_parts(count: int) -> None:
    sizes = {"a": 100, "b": 1, "c": 0, "d": 37, "e": 3}
    owners = [list(deal(sizes, index, count)) for index in range(count)]
    elements = [(name, i) for owner in owners for name, flat in owner for i in flat]
    assert elements == [(name, i) for name, size in sizes.items() for i in range(size)]
    totals = [sum(len(flat) for _, flat in owner) for owner in owners]
    assert max(totals) - min(totals) <= 1
