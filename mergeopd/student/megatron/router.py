"""The router of a mixture of experts: as in transformers, in the precision of the forward pass."""

from __future__ import annotations

from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.nn.functional import linear


class Router(TopKRouter):  # type: ignore[misc]
    """Megatron's choice of experts, with torch's product for the logits.

    Megatron's own product fails without Transformer Engine.
    """

    def gating(self, input: Tensor) -> Tensor:
        return linear(input, self.weight)
