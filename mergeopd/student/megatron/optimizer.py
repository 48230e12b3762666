"""AdamW on a grid: Megatron's optimizers, and their state as whole shards whoever holds which part."""

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
    """AdamW over float32 parameters, grouped as in `TorchStudent`: matrices decay, vectors do not.

    Several data-parallel copies share its state among them. It is torch's, also where transformer engine or
    Apex has one: those keep the number of updates elsewhere, and a checkpoint could not be written.
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
        use_distributed_optimizer=grid.data > 1,
    )
    adamw = get_megatron_optimizer(options, [ddp], use_gloo_process_groups=False, pg_collection=grid.groups)
    for group in adamw.param_groups:  # Megatron leaves this to a scheduler that is not used here
        group["weight_decay"] = optimizer.weight_decay * group["wd_mult"]
    return adamw


class MainParameters:
    """The float32 parameters that AdamW works on, and their moments, by the model's parameters."""

    def __init__(self, adamw: Any, grid: Grid) -> None:
        [self._inner] = adamw.chained_optimizers
        self._grid = grid

    def step(self) -> int:
        """Updates done; equal for all parameters, so that any tells.

        Raises RuntimeError for an optimizer that keeps it elsewhere, as transformer engine's does.
        """
        if not isinstance(self._inner.optimizer, torch.optim.AdamW):
            raise RuntimeError(f"the state of {type(self._inner.optimizer).__name__} is not mapped")
        states = self._inner.optimizer.state.values()
        return next((int(state["step"]) for state in states), 0)

    def read(self, parameter: nn.Parameter, key: str) -> Tensor:
        """`param` or a moment, float32, in the parameter's shape. Collective over data-parallel copies."""
        main = self._main(parameter)
        value = main if key == "param" or main is None else self._inner.optimizer.state[main][key]
        if self._grid.data == 1:
            found: Tensor = value.detach()
            return found
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if value is not None:
            whole[self._own(parameter)] = value.detach()
        dist.all_reduce(whole, group=self._grid.groups.dp)
        return whole.view(parameter.shape)

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, values: dict[str, Tensor], step: int) -> None:
        """Put in `param` and, where there are any, the moments after `step` updates; whole shards."""
        parameter.copy_(values["param"])
        main = self._main(parameter)
        if main is None:
            return
        own = {key: value.to(main) for key, value in values.items()}
        if self._grid.data > 1:
            own = {key: value.flatten()[self._own(parameter)] for key, value in own.items()}
        main.copy_(own["param"])
        if step:
            # A step of its own for each parameter: AdamW counts it up in place.
            moments = {key: own[key].clone() for key in MOMENTS}
            self._inner.optimizer.state[main] = {"step": torch.tensor(float(step)), **moments}

    def _main(self, parameter: nn.Parameter) -> Any:
        """What AdamW holds of `parameter`: all, this copy's flat part, or None where it has no part."""
        if self._grid.data == 1:
            return getattr(parameter, "main_param", parameter)
        place = self._inner.model_param_group_index_map.get(parameter)
        if place is None:
            return None
        group, position = place
        return self._inner.optimizer.param_groups[group]["params"][position]

    def _own(self, parameter: nn.Parameter) -> slice:
        part = self._inner._get_model_param_range_map(parameter)["param"]
        return slice(part.start, part.end)
