"""AdamW over this process's part of the weights, with its state on their device or in main memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mergeopd.recipe.training import Optimizer

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class AdamW:
    """Updates `masters` in place from their `grad`; matrices decay, vectors do not.

    With `optimizer.offload` the moments are in main memory, beside copies of the masters that are updated
    there: gradients are copied to them, and the updated weights back, once per step.
    """

    def __init__(
        self, masters: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], optimizer: Optimizer
    ) -> None:
        self._masters = masters
        self._copies = masters
        if optimizer.offload:
            self._copies = {name: _on_host(p) for name, p in masters.items()}
            _wait(masters)
        decayed = [p for name, p in self._copies.items() if len(shapes[name]) > 1]
        spared = [p for name, p in self._copies.items() if len(shapes[name]) <= 1]
        decays = ((decayed, optimizer.weight_decay), (spared, 0.0))
        groups = [{"params": parameters, "weight_decay": decay} for parameters, decay in decays]
        self._adamw = torch.optim.AdamW(groups, 0.0, optimizer.betas, optimizer.eps, fused=True)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the masters and drop their gradients."""
        is_offloaded = self._copies is not self._masters
        if is_offloaded:
            for name, copy in self._copies.items():
                gradient = self._masters[name].grad
                copy.grad = None if gradient is None else _on_host(gradient)
            _wait(self._masters)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        if is_offloaded:
            for name, master in self._masters.items():
                master.copy_(self._copies[name], non_blocking=True)
                master.grad = None

    def moments(self, name: str) -> dict[str, Tensor]:
        """Return this process's part of what is kept of a parameter; empty before the first step."""
        return dict(self._adamw.state.get(self._copies[name], {}))

    @torch.no_grad()
    def load(self, name: str, moments: Mapping[str, Tensor]) -> None:
        """Take over a master that was set, and restore its `moments`, if there are any."""
        copy = self._copies[name]
        copy.copy_(self._masters[name])
        if moments:
            # Fused AdamW keeps its step count, too, on the parameter's device.
            self._adamw.state[copy] = {key: t.to(copy.device, copy=True) for key, t in moments.items()}


def _on_host(tensor: Tensor) -> Tensor:
    """Return a copy in main memory, pinned if the tensor is on a GPU; it is complete after `_wait`."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
    return host.copy_(tensor.detach(), non_blocking=True).requires_grad_(False)


def _wait(tensors: Mapping[str, Tensor]) -> None:
    """Wait for copies from the device of these tensors."""
    device = next(iter(tensors.values())).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
