"""The hidden states of a round, from a teacher's turn until the update that needs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class HiddenCache:
    """Last hidden states of response tokens, by teacher and rollout."""

    def __init__(self) -> None:
        self._hidden: dict[tuple[str, int], Tensor] = {}

    def put(self, teacher: str, rollout: int, hidden: Tensor) -> None:
        """Keep `[response length, d_T]` for one rollout (its index in the round). Twice is a KeyError."""
        if (teacher, rollout) in self._hidden:
            raise KeyError(f"teacher {teacher!r} has already scored rollout {rollout}")
        self._hidden[teacher, rollout] = hidden

    def gather(self, teacher: str, rollouts: Sequence[int]) -> Tensor:
        """`[sum of response lengths, d_T]` in the order of `rollouts`. A missing one is a KeyError."""
        return torch.cat([self._hidden[teacher, rollout] for rollout in rollouts])

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        return sum(hidden.numel() * hidden.element_size() for hidden in self._hidden.values())
