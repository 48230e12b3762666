"""Copies that wait: an outbox with events of its own in place of an accelerator's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergeopd import transfers
from mergeopd.teacher.hidden_cache import HiddenCache
from mergeopd.transfers import Outbox

CPU = torch.device("cpu")


class LateCopy:
    """A copy that has its numbers only when its event was waited for."""

    waits: list[int]

    def __init__(self, source: Tensor) -> None:
        # The source may be overwritten by what follows in its queue.
        self.numbers, self.copy = source.clone(), torch.full_like(source, torch.nan)

    def synchronize(self) -> None:
        self.copy.copy_(self.numbers)
        self.waits.append(len(self.numbers))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the copies waited for."""

    def started(tensor: Tensor) -> tuple[Tensor, LateCopy]:
        late = LateCopy(tensor)
        return late.copy, late

    monkeypatch.setattr(transfers, "_started", started)
    monkeypatch.setattr(LateCopy, "waits", [], raising=False)
    return LateCopy.waits


def test_copies_are_handed_over_in_order_and_not_before_they_are_there(waits: list[int]) -> None:
    outbox, arrived = Outbox(limit_bytes=5 * 8), list[list[float]]()
    for num in (2, 3, 1):
        source = torch.full((num,), float(num), dtype=torch.float64)
        outbox.send(source, lambda copy: arrived.append(copy.tolist()))
        source.zero_()
    assert waits == [2]  # the third exceeded the limit
    outbox.send(torch.full((9,), 9.0), lambda copy: arrived.append(copy.tolist()))
    outbox.flush()
    outbox.flush()
    assert waits == [2, 3, 1, 9]
    assert arrived == [[2.0] * 2, [3.0] * 3, [1.0], [9.0] * 9]


@pytest.mark.parametrize("budget_bytes", [0, 100, 1 << 20])
def test_hidden_states_are_read_only_when_they_have_arrived(
    tmp_path: Path, waits: list[int], budget_bytes: int
) -> None:
    states = {i: torch.randn(i + 1, 3) for i in range(6)}
    with HiddenCache(budget_bytes, tmp_path, CPU) as cache:
        for i, hidden in states.items():
            cache.put("t", i, hidden)
        assert waits == []
        with pytest.raises(KeyError, match="already scored rollout 2"):
            cache.put("t", 2, states[2])
        cache.publish()
        assert waits == [1, 2, 3, 4, 5, 6]
        assert torch.equal(cache.gather("t", [4, 0, 5]), torch.cat([states[i] for i in (4, 0, 5)]))
        assert cache.num_bytes <= budget_bytes
        assert cache.num_bytes + cache.num_spilled_bytes == 21 * 3 * 4


def test_what_was_not_handed_over_can_be_forgotten(waits: list[int]) -> None:
    outbox = Outbox(1 << 20)
    outbox.send(torch.ones(3), lambda copy: pytest.fail("forgotten"))
    outbox.clear()
    outbox.flush()
    assert waits == []
