"""AdamW with its moments on the host against torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from mergeopd.student.host_adamw import HostAdamW


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((5, 7), (3,), (4, 2))]


def made(kind: type[torch.optim.AdamW], own: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    groups = [
        {"params": [own[0], own[2]], "weight_decay": 0.1},
        {"params": [own[1]], "weight_decay": 0.0, "lr": 0.02},
    ]
    return kind(groups, lr=0.01, betas=(0.9, 0.98), eps=1e-6, foreach=False)


def step(optimizer: torch.optim.AdamW, own: list[torch.nn.Parameter], number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for i, parameter in enumerate(own):
        # One parameter without a gradient at times: its state does not change.
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if number % 3 == i == 1 else gradient
    optimizer.step()


def test_updates_equal_adamw_bit_for_bit() -> None:
    expected, own = parameters(), parameters()
    reference, optimizer = made(torch.optim.AdamW, expected), made(HostAdamW, own)
    for number in range(5):
        step(reference, expected, number)
        step(optimizer, own, number)
        assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))
    for a, b in zip(own, expected, strict=True):
        assert optimizer.state[a]["step"] == reference.state[b]["step"]
        assert torch.equal(optimizer.state[a]["exp_avg_sq"], reference.state[b]["exp_avg_sq"])


def test_held_moments_are_copies_from_which_updates_continue() -> None:
    own = parameters()
    reference = made(torch.optim.AdamW, own)
    for number in range(2):
        step(reference, own, number)
    again = copy.deepcopy(own)
    optimizer = made(HostAdamW, again)
    for a, b in zip(again, own, strict=True):
        state: dict[str, Tensor] = reference.state[b]
        assert isinstance(optimizer, HostAdamW)
        optimizer.hold(a, float(state["step"]), state)
    step(reference, own, 2)
    step(optimizer, again, 2)
    assert all(torch.equal(a, b) for a, b in zip(again, own, strict=True))


def test_closures_are_refused() -> None:
    with pytest.raises(ValueError, match="a closure is not supported"):
        made(HostAdamW, parameters()).step(lambda: 0.0)
