"""AdamW with its moments in pinned memory: torch's updates, without the moments on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mergeopd.student.host_adamw import MOMENTS, HostAdamW

NUM, SIZE = 16, 1 << 20


def test_moments_visit_the_device(device: Any, record: Callable[[str, object], None]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(SIZE, generator=generator) for _ in range(NUM)]
    made: list[tuple[torch.optim.AdamW, list[torch.nn.Parameter]]] = []
    kept: list[int] = []
    for kind in (torch.optim.AdamW, HostAdamW):
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        own = [torch.nn.Parameter(v.to(device)) for v in values]
        optimizer = kind(own, lr=0.01, betas=(0.9, 0.98), weight_decay=0.1, foreach=False)
        for number in range(3):
            for parameter in own:
                parameter.grad = torch.sin(parameter.detach() * (number + 1))
            optimizer.step()
        made.append((optimizer, own))
        if device.type == "cuda":
            torch.cuda.synchronize()
            kept.append(torch.cuda.memory_allocated() - before)
    (_, expected), (optimizer, own) = made
    assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))
    for parameter in own:
        held = [optimizer.state[parameter][key] for key in MOMENTS]
        assert all(moment.device.type == "cpu" for moment in held)
        assert device.type == "cpu" or all(moment.is_pinned() for moment in held)
    if kept:
        record("host_adamw_bytes_saved", kept[0] - kept[1])
        assert kept[0] - kept[1] >= 0.95 * 2 * 4 * NUM * SIZE
