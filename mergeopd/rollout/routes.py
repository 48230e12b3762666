"""The experts that compute each token: recorded while a model generates, and forced when it is trained.

Routes are `[tokens, layers with experts, experts of a token]`, for positions from the first of the prompt on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mergeopd.types import Routes

FREE = -1
"""Stands in a table for a token whose experts the router chooses."""


@contextmanager
def recorded(body: nn.Module) -> Iterator[Callable[[], Routes]]:
    """Record the routes of the body's passes; the function returns those since its last call."""
    seen: list[Tensor] = []
    routers = _routers(body)
    hooks = [router.register_forward_hook(lambda *call: seen.append(call[-1][2])) for router in routers]

    def take() -> Routes:
        routes = torch.stack(seen, 1)
        seen.clear()
        return routes.cpu().numpy().astype(np.min_scalar_type(routers[0].num_experts - 1))

    try:
        yield take
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def forced(body: nn.Module, table_BTLK: Tensor | None) -> Iterator[None]:
    """Let these experts compute each token, weighted by the router's current probabilities.

    Must enclose the backward pass of layers that are recomputed. Without a table nothing is changed.
    """
    if table_BTLK is None:
        yield
        return
    rows = table_BTLK.flatten(0, 1).unbind(1)
    hooks = [
        router.register_forward_hook(lambda module, _, output, own=own: _chosen(module, output, own))
        for router, own in zip(_routers(body), rows, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def route_table(routes: Sequence[Routes | None], width: int, device: torch.device) -> Tensor | None:
    """Return the routes of padded sequences, `[B, width, L, K]` with FREE where none is known.

    None if no sequence has any.
    """
    shapes = {own.shape[1:] for own in routes if own is not None}
    if not shapes:
        return None
    [shape] = shapes
    table = np.full((len(routes), width, *shape), FREE, np.int16)
    for row, own in enumerate(routes):
        if own is not None:
            table[row, : len(own)] = own
    return torch.from_numpy(table).to(device).long()


def with_forced(indices: Tensor, forced: Tensor) -> Tensor:
    """Return the experts of each token: the forced ones, where there are any."""
    return torch.where(forced == FREE, indices, forced)


def _routers(body: nn.Module) -> list[Any]:
    return [module for name, module in body.named_modules() if name.endswith(".mlp.gate")]


def _chosen(router: Any, output: tuple[Tensor, Tensor, Tensor], forced: Tensor) -> tuple[Tensor, ...]:
    logits, weights, indices = output
    experts = with_forced(indices, forced)
    probs = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).gather(1, experts)
    if getattr(router, "norm_topk_prob", True):  # Mixtral has no such setting, and always does
        probs = probs / probs.sum(-1, keepdim=True)
    return logits, probs.to(weights.dtype), experts
