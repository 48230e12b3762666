"""AdamW over this process's part of the weights, with its moments on their device or in host memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mergeopd.recipe.training import Optimizer
from mergeopd.student.host_adamw import MOMENTS, HostAdamW


class AdamW:
    """Updates `masters` in place from their `grad`; matrices decay, vectors do not.

    With `optimizer.offload` the moments are in host memory and visit the masters' device one parameter at a
    time.
    """

    def __init__(
        self, masters: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], optimizer: Optimizer
    ) -> None:
        self._masters = masters
        decayed = [p for name, p in masters.items() if len(shapes[name]) > 1]
        spared = [p for name, p in masters.items() if len(shapes[name]) <= 1]
        decays = ((decayed, optimizer.weight_decay), (spared, 0.0))
        groups = [{"params": parameters, "weight_decay": decay} for parameters, decay in decays]
        self._adamw: torch.optim.AdamW
        if optimizer.offload:
            self._adamw = HostAdamW(groups, 0.0, optimizer.betas, optimizer.eps)
        else:
            self._adamw = torch.optim.AdamW(groups, 0.0, optimizer.betas, optimizer.eps, fused=True)

    def step(self, lr: float) -> None:
        """Update the masters and drop their gradients."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)

    def step_count(self, name: str) -> Tensor | None:
        """Return a parameter's number of updates; None before the first."""
        count: Tensor | None = self._adamw.state.get(self._masters[name], {}).get("step")
        return count

    def moments(self, name: str) -> dict[str, Tensor]:
        """Return this process's part of a parameter's moments; empty before the first update."""
        state = self._adamw.state.get(self._masters[name], {})
        return {key: state[key] for key in MOMENTS if key in state}

    def load(self, name: str, step: Tensor, moments: Mapping[str, Tensor]) -> None:
        """Set a parameter's number of updates and moments, which are copied."""
        master = self._masters[name]
        if isinstance(self._adamw, HostAdamW):
            self._adamw.hold(master, float(step), moments)
        else:
            # Fused AdamW keeps its step count, too, on the parameter's device.
            state = {"step": step, **moments}
            self._adamw.state[master] = {key: t.to(master.device, copy=True) for key, t in state.items()}
