"""Which sequences share a padded batch. Pure, no tensors."""

from __future__ import annotations

from collections.abc import Sequence


def length_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices grouped so that a group padded to its longest member holds at most `max_tokens` tokens.

    Longest first, neighbours in length together, so that little is spent on padding. A single sequence
    longer than `max_tokens` gets a group of its own. Every index appears exactly once.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
