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

    Its state is sharded over the ranks that have the same parameters, if `ddp` is so configured. Always
    torch's AdamW: those of Transformer Engine and Apex store the number of updates elsewhere, so that a
    checkpoint could not be written.
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
        use_distributed_optimizer=ddp.ddp_config.use_distributed_optimizer,
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
        self._optimizers, self._grid = adamw.chained_optimizers, grid
        self.is_sharded = self._optimizers[0].config.use_distributed_optimizer

    def step(self) -> int:
        """Number of updates, read from any parameter.

        Raises RuntimeError for an optimizer that keeps it elsewhere, such as Transformer Engine's.
        """
        states: list[Any] = []
        for inner in self._optimizers:
            if not isinstance(inner.optimizer, torch.optim.AdamW):
                raise RuntimeError(f"the state of {type(inner.optimizer).__name__} is not mapped")
            states += inner.optimizer.state.values()
        return int(states[0]["step"]) if states else 0

    def read(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Return `param` or a moment, float32, in the parameter's shape. Collective over its holders."""
        own, value = self.own(parameter), self.read_own(parameter, key)
        if not self.is_sharded:
            return value.to(parameter.device).view(parameter.shape)
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        whole[own.start : own.stop] = value
        groups = self._grid.groups
        dist.all_reduce(whole, group=groups.expt_dp if _is_of_expert(parameter) else groups.dp_cp)
        return whole.view(parameter.shape)

    def own(self, parameter: nn.Parameter) -> range:
        """Return the flat range of the parameter whose state is on this rank; it may be empty."""
        if not self.is_sharded:
            return range(parameter.numel())
        inner = self._optimizer_of(parameter)
        if parameter not in inner.model_param_group_index_map:
            return range(0)
        part = inner._get_model_param_range_map(parameter)["param"]
        return range(part.start, part.end)

    def read_own(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Return the elements `own(parameter)` of `param` or a moment, flat and float32; not a copy."""
        main = self._main(parameter)
        if main is None:
            return parameter.new_empty(0, dtype=torch.float32)
        value: Tensor = main if key == "param" else self._optimizer_of(parameter).optimizer.state[main][key]
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
            inner = self._optimizer_of(parameter).optimizer
            held = {key: values[key].view(main.shape) for key in MOMENTS}
            if isinstance(inner, HostAdamW):
                inner.hold(main, float(step), held)
            else:
                moments = {key: moment.to(main, copy=True) for key, moment in held.items()}
                inner.state[main] = {"step": torch.tensor(float(step)), **moments}

    def _main(self, parameter: nn.Parameter) -> Any:
        """Return AdamW's part of `parameter`: all, this copy's flat part, or None."""
        if not self.is_sharded:
            return getattr(parameter, "main_param", parameter)
        inner = self._optimizer_of(parameter)
        place = inner.model_param_group_index_map.get(parameter)
        if place is None:
            return None
        group, position = place
        return inner.optimizer.param_groups[group]["params"][position]

    def _optimizer_of(self, parameter: nn.Parameter) -> Any:
        """Return Megatron's optimizer of a parameter: the last one has the experts, if there are any."""
        return self._optimizers[-1 if _is_of_expert(parameter) else 0]


def _is_of_expert(parameter: nn.Parameter) -> bool:
    """Whether the ranks with this parameter are those with the same experts, not all data-parallel copies."""
    return not getattr(parameter, "allreduce", True)
