"""AdamW on a grid: Megatron's optimizers, and access to their state as full shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as library
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor, nn

from mergeopd.recipe.training import Optimizer
from mergeopd.student.host_adamw import MOMENTS, HostAdamW
from mergeopd.student.megatron.grid import Grid


def build_adamw(ddp: Any, optimizer: Optimizer, dtype: torch.dtype, grid: Grid) -> Any:
    """Build AdamW over float32 parameters, grouped as in `TorchStudent`: matrices decay, vectors do not.

    Its state is sharded over the processes that hold the same weights. Always torch's AdamW: those of
    Transformer Engine and Apex store the number of updates elsewhere, so that a checkpoint could not be
    written.
    """
    library.USING_PYTORCH_OPTIMIZER = True
    options = OptimizerConfig(
        optimizer="adam",
        lr=0.0,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=grid.holders > 1,
    )
    adamw = get_megatron_optimizer(options, [ddp], use_gloo_process_groups=False, pg_collection=grid.groups)
    for group in adamw.param_groups:  # Megatron leaves this to a scheduler that is not used here
        group["weight_decay"] = optimizer.weight_decay * group["wd_mult"]
    for inner in adamw.chained_optimizers if optimizer.offload else ():
        inner.optimizer = HostAdamW.replacing(inner.optimizer)
    return adamw


class MainParameters:
    """AdamW's float32 parameters and their moments, by the model's parameters."""

    def __init__(self, adamw: Any, grid: Grid) -> None:
        [self._inner] = adamw.chained_optimizers
        self._grid = grid

    def step(self) -> int:
        """Number of updates, read from any parameter.

        Raises RuntimeError for an optimizer that keeps it elsewhere, such as Transformer Engine's.
        """
        if not isinstance(self._inner.optimizer, torch.optim.AdamW):
            raise RuntimeError(f"the state of {type(self._inner.optimizer).__name__} is not mapped")
        states = self._inner.optimizer.state.values()
        return next((int(state["step"]) for state in states), 0)

    def read(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Return `param` or a moment, float32, in the parameter's shape. Collective over its holders."""
        own, value = self.own(parameter), self.read_own(parameter, key)
        if self._grid.holders == 1:
            return value.to(parameter.device).view(parameter.shape)
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        whole[own.start : own.stop] = value
        dist.all_reduce(whole, group=self._grid.groups.dp_cp)
        return whole.view(parameter.shape)

    def own(self, parameter: nn.Parameter) -> range:
        """Return the flat range of the parameter whose state is on this rank; it may be empty."""
        if self._grid.holders == 1:
            return range(parameter.numel())
        if parameter not in self._inner.model_param_group_index_map:
            return range(0)
        part = self._inner._get_model_param_range_map(parameter)["param"]
        return range(part.start, part.end)

    def read_own(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Return the elements `own(parameter)` of `param` or a moment, flat and float32; not a copy."""
        main = self._main(parameter)
        if main is None:
            return parameter.new_empty(0, dtype=torch.float32)
        value: Tensor = main if key == "param" else self._inner.optimizer.state[main][key]
        return value.detach().view(-1)

    @torch.no_grad()
    def write_own(self, parameter: nn.Parameter, values: Mapping[str, Tensor], step: int) -> None:
        """Set `param` and, if given, the moments after `step` updates, from elements `own(parameter)`.

        Sets the same elements of the model's parameter.
        """
        main, own = self._main(parameter), self.own(parameter)
        if main is None:
            return
        parameter.view(-1)[own.start : own.stop] = values["param"].to(parameter.device)
        main.copy_(values["param"].view(main.shape))
        if step:
            # One step tensor per parameter: AdamW increments it in place.
            inner, held = self._inner.optimizer, {key: values[key].view(main.shape) for key in MOMENTS}
            if isinstance(inner, HostAdamW):
                inner.hold(main, float(step), held)
            else:
                moments = {key: moment.to(main, copy=True) for key, moment in held.items()}
                inner.state[main] = {"step": torch.tensor(float(step)), **moments}

    def _main(self, parameter: nn.Parameter) -> Any:
        """Return AdamW's part of `parameter`: all, this copy's flat part, or None."""
        if self._grid.holders == 1:
            return getattr(parameter, "main_param", parameter)
        place = self._inner.model_param_group_index_map.get(parameter)
        if place is None:
            return None
        group, position = place
        return self._inner.optimizer.param_groups[group]["params"][position]
