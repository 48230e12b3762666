"""AdamW on a grid: Megatron's optimizers, and access to their state as full shards."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as library
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor, nn

from mergeopd.recipe.training import Optimizer
from mergeopd.student.megatron.grid import Grid

MOMENTS = ("exp_avg", "exp_avg_sq")


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
        main = self._main(parameter)
        value = main if key == "param" or main is None else self._inner.optimizer.state[main][key]
        if self._grid.holders == 1:
            detached: Tensor = value.detach()
            return detached
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if value is not None:
            whole[self._own(parameter)] = value.detach()
        dist.all_reduce(whole, group=self._grid.groups.dp_cp)
        return whole.view(parameter.shape)

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, values: dict[str, Tensor], step: int) -> None:
        """Set `param` and, if given, the moments after `step` updates, from full shards."""
        parameter.copy_(values["param"])
        main = self._main(parameter)
        if main is None:
            return
        own = {key: value.to(main) for key, value in values.items()}
        if self._grid.holders > 1:
            own = {key: value.flatten()[self._own(parameter)] for key, value in own.items()}
        main.copy_(own["param"])
        if step:
            # One step tensor per parameter: AdamW increments it in place.
            moments = {key: own[key].clone() for key in MOMENTS}
            self._inner.optimizer.state[main] = {"step": torch.tensor(float(step)), **moments}

    def _main(self, parameter: nn.Parameter) -> Any:
        """Return AdamW's part of `parameter`: all, this copy's flat part, or None."""
        if self._grid.holders == 1:
            return getattr(parameter, "main_param", parameter)
        place = self._inner.model_param_group_index_map.get(parameter)
        if place is None:
            return None
        group, position = place
        return self._inner.optimizer.param_groups[group]["params"][position]

    def _own(self, parameter: nn.Parameter) -> slice:
        part = self._inner._get_model_param_range_map(parameter)["param"]
        return slice(part.start, part.end)
