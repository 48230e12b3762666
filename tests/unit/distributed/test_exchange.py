"""Objects between processes: every process gets every byte, by few and small collectives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeopd.distributed.exchange import HEAD_BYTES, Packed, size_of, steps, unpacked, unpacked_head

PART = 4096


def received(values: list[Any]) -> tuple[list[Any], int]:
    """What any process has after the exchange of `values`, by rank; and the number of collectives."""
    packed = [Packed.of(value) for value in values]
    sizes = [size_of(one.head) for one in packed]
    contents = [np.full(size, 7, np.uint8) for size in sizes]
    moves = list(steps(sizes, PART))
    for move in moves:
        senders = range(len(values)) if move.sender is None else [move.sender]
        assert move.num_bytes * len(senders) <= max(PART, 8 * len(values))
        for rank in senders:
            message = np.zeros(move.num_bytes, np.uint8)
            packed[rank].copy_to(message, move.start)
            part = contents[rank][move.start : move.start + move.num_bytes]
            part[:] = message[: len(part)]
    assert all(len(one.head) == HEAD_BYTES for one in packed)
    objects = [
        unpacked(content.data) if len(content) else unpacked_head(one.head)
        for one, content in zip(packed, contents, strict=True)
    ]
    return objects, len(moves)


@given(st.lists(st.lists(st.integers(0, 3000), max_size=4), min_size=1, max_size=40))
def test_every_object_arrives(lengths: list[list[int]]) -> None:
    values = [
        {"rank": rank, "ids": [np.arange(n, dtype=np.int32) + rank for n in own], "text": "x" * sum(own)}
        for rank, own in enumerate(lengths)
    ]
    found, _ = received(values)
    for value, one in zip(values, found, strict=True):
        assert (one["rank"], one["text"]) == (value["rank"], value["text"])
        for ids, expected in zip(one["ids"], value["ids"], strict=True):
            assert ids.dtype == np.int32
            assert not ids.flags.writeable
            assert ids.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("values", "num_collectives"),
    [
        ([None] * 1000, 0),  # in the heads
        ([np.zeros(4000, np.uint8)] * 16, 17),  # parts of 256 bytes, from everyone at once
        ([np.zeros(10_000, np.uint8), *[None] * 999], 3),  # from the first one alone
    ],
)
def test_as_few_messages_as_memory_allows(values: list[Any], num_collectives: int) -> None:
    assert received(values)[1] == num_collectives
