"""AdamW with its moments in host memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

MOMENTS = ("exp_avg", "exp_avg_sq")


class HostAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` whose moments visit the parameters' device one parameter at a time.

    The update is that of AdamW with its moments on the device and `foreach=False`, bit for bit. While one
    parameter is updated, the next one's moments are read from pinned memory and the last one's are written,
    each on a stream of its own. Where the device is the CPU, nothing is copied.
    """

    @classmethod
    def replacing(cls, optimizer: torch.optim.AdamW) -> HostAdamW:
        """Take over the groups of an optimizer without state; its parameters may be views of others."""
        own = cls([torch.nn.Parameter(torch.empty(0))])
        own.param_groups = optimizer.param_groups
        return own

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Perform one update. Raises ValueError for a closure, which is not supported."""
        if closure is not None:
            raise ValueError("HostAdamW.step: a closure is not supported")
        work = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        on_gpu = bool(work) and work[0][0].is_cuda
        transfers = _Transfers() if on_gpu else None
        for parameter, _ in work:
            if not self.state[parameter]:
                zeros = torch.zeros_like(parameter)
                self.hold(parameter, 0.0, dict.fromkeys(MOMENTS, zeros))
        coming = self._read(work[0][0], transfers) if work else []
        for number, (parameter, group) in enumerate(work):
            moments = coming
            if transfers is not None:
                torch.cuda.current_stream().wait_stream(transfers.reading)
            if number + 1 < len(work):
                coming = self._read(work[number + 1][0], transfers)
            _update(parameter, moments, self.state[parameter]["step"], group)
            if transfers is not None:
                transfers.write(moments, [self.state[parameter][key] for key in MOMENTS])
        if transfers is not None:
            transfers.writing.synchronize()  # the next reader may be the host

    def hold(self, parameter: Tensor, step: float, moments: Mapping[str, Tensor]) -> None:
        """Set a parameter's state after `step` updates; the moments are copied to the host."""
        held = {}
        for key in MOMENTS:
            shape, pinned = parameter.shape, parameter.is_cuda
            held[key] = torch.empty(shape, dtype=parameter.dtype, device="cpu", pin_memory=pinned)
            held[key].copy_(moments[key])
        self.state[parameter] = {"step": torch.tensor(step), **held}

    def _read(self, parameter: Tensor, transfers: _Transfers | None) -> list[Tensor]:
        held = [self.state[parameter][key] for key in MOMENTS]
        return held if transfers is None else transfers.read(held, parameter.device)


class _Transfers:
    """Copies between pinned memory and the GPU beside its work."""

    def __init__(self) -> None:
        self.reading: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.writing: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def read(self, held: list[Tensor], device: torch.device) -> list[Tensor]:
        with torch.cuda.stream(self.reading):
            moments = [moment.to(device, non_blocking=True) for moment in held]
        for moment in moments:
            moment.record_stream(torch.cuda.current_stream())
        return moments

    def write(self, moments: list[Tensor], held: list[Tensor]) -> None:
        self.writing.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.writing):
            for moment, place in zip(moments, held, strict=True):
                moment.record_stream(self.writing)
                place.copy_(moment, non_blocking=True)


def _update(parameter: Tensor, moments: list[Tensor], step: Tensor, group: Mapping[str, Any]) -> None:
    assert parameter.grad is not None
    beta1, beta2 = group["betas"]
    adamw(
        [parameter],
        [parameter.grad],
        [moments[0]],
        [moments[1]],
        [],
        [step],
        foreach=False,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
