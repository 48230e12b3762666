"""Options of passes through a body: recomputation in the backward pass, compilation, packing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class PassOptions:
    """How passes are made, without a change of what they compute.

    `recompute`: layers are computed again in the backward pass, `compiled`: by torch.compile; `packing`: the
    sequences of a micro-batch form one row without padding; `layerwise`: a sharded student generates without
    a whole copy on every process.
    """

    recompute: bool = False
    compiled: bool = False
    packing: bool = False
    layerwise: bool = False


def set_layer_options(body: nn.Module, options: PassOptions) -> None:
    """Replace the forward functions of the layers; parameters and module names stay the same.

    Must run before `fully_shard`, so that its hooks are outside of what is compiled and recomputed.
    """
    layers = body.layers
    assert isinstance(layers, nn.ModuleList)
    for layer in layers:
        if options.compiled:
            layer.forward = _compiled(layer.forward)
        if options.recompute:
            layer.forward = _recomputed(layer.forward)


def _recomputed(forward: Forward) -> Forward:
    """Keep only the inputs of a layer for its backward pass."""

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Nothing in a layer is random: dropout is off.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return call


def _compiled(forward: Forward) -> Forward:
    """Compile a layer for whole sequences; decoding, whose cache grows with every token, is not compiled."""
    fast = torch.compile(forward, dynamic=True)

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (forward if kwargs.get("past_key_values") is not None else fast)(*args, **kwargs)

    return call
