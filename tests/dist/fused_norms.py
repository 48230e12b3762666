"""Parts of a layer with Transformer Engine's parameters: a norm inside the linear layer behind it."""

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor, nn

from mergeopd.student.megatron.specs import LocalParts


class NormLinear(ColumnParallelLinear):
    """`TELayerNormColumnParallelLinear` by Megatron's own linear layer: `layer_norm_weight` and `weight`."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        self.layer_norm_weight = nn.Parameter(torch.empty(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel
        self.eps = config.layernorm_epsilon

    def forward(self, hidden: Tensor) -> Any:
        shape = self.layer_norm_weight.shape
        return super().forward(nn.functional.rms_norm(hidden, shape, self.layer_norm_weight, self.eps))


class FusedParts(LocalParts):
    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return NormLinear
