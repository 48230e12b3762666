"""Groupings of sequences against all possible ones."""

from __future__ import annotations

from itertools import pairwise, product

from hypothesis import given
from hypothesis import strategies as st

from mergeopd.batch.packing import length_batches, sum_batches


def cost(lengths: list[int], batches: list[list[int]], max_tokens: int) -> float:
    return sum(len(b) * max(lengths[i] for i in b) + max_tokens / 64 for b in batches)


def groupings(lengths: list[int], max_tokens: int) -> list[list[list[int]]]:
    """Every way to cut the sequences, longest first, into groups that fit."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found = []
    for cuts in product([False, True], repeat=max(len(order) - 1, 0)):
        batches = [[order[0]]]
        for i, cut in zip(order[1:], cuts, strict=True):
            if cut:
                batches.append([i])
            else:
                batches[-1].append(i)
        if all(len(b) == 1 or len(b) * lengths[b[0]] <= max_tokens for b in batches):
            found.append(batches)
    return found


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.sampled_from([1, 50, 200, 1000, 4000]))
def test_no_other_grouping_is_cheaper(lengths: list[int], max_tokens: int) -> None:
    chosen = length_batches(lengths, max_tokens)
    best = min(cost(lengths, batches, max_tokens) for batches in groupings(lengths, max_tokens))
    assert abs(cost(lengths, chosen, max_tokens) - best) < 1e-9


def test_a_few_long_sequences_do_not_pad_many_short_ones() -> None:
    lengths = [14] * 29 + [48, 47, 33]
    assert [sorted(lengths[i] for i in b) for b in length_batches(lengths, 16384)] == [
        [33, 47, 48],
        [14] * 29,
    ]
    assert length_batches([184, 200, 190, 197], 16384) == [[1, 3, 2, 0]]  # little to save: one pass


@given(lengths=st.lists(st.integers(1, 40), max_size=30), max_tokens=st.integers(1, 60))
def test_groups_without_padding_are_filled_in_order(lengths: list[int], max_tokens: int) -> None:
    batches = sum_batches(lengths, max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch, following in pairwise(batches):
        # Full: the next one would not fit.
        assert sum(lengths[i] for i in batch) + lengths[following[0]] > max_tokens
    assert all(sum(lengths[i] for i in batch) <= max_tokens for batch in batches if len(batch) > 1)
