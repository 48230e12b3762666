"""The router of a mixture of experts: as in transformers, or with the experts that a rollout recorded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn
from torch.nn.functional import linear

from mergeopd.batch.micro_batch import MicroBatch
from mergeopd.rollout.routes import route_table, with_forced
from mergeopd.student.megatron.architecture import Architecture
from mergeopd.student.megatron.grid import Grid
from mergeopd.student.megatron.sequence import own_positions


class Router(TopKRouter):  # type: ignore[misc]
    """Megatron's choice of experts, with torch's product for the logits, and forced experts.

    Megatron's own product fails without Transformer Engine.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.router_replay = ForcedExperts(self.config.recompute_granularity == "full")

    def gating(self, input: Tensor) -> Tensor:
        return linear(input, self.weight)


class ForcedExperts:
    """The experts of a layer's tokens in the current micro-batch, in the form of Megatron's `RouterReplay`.

    A layer that is recomputed runs first without gradients, and again in the backward pass: micro-batches in
    the same order.
    """

    def __init__(self, is_recomputed: bool) -> None:
        self._is_recomputed = is_recomputed
        self._current: Tensor | None = None
        self._again: deque[Tensor | None] = deque()

    def reset(self) -> None:
        self._current = None
        self._again.clear()

    def begin(self, forced: Tensor | None) -> None:
        """Take the experts of the next micro-batch; None: the router's own."""
        self._current = forced
        if self._is_recomputed and torch.is_grad_enabled():
            self._again.append(forced)

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Return the scores and the numbers of each token's experts."""
        is_again = self._is_recomputed and torch.is_grad_enabled()
        forced = self._again.popleft() if is_again else self._current
        values, indices = default_compute_topk(scores, topk, num_groups, group_topk)
        if forced is None:
            return values, indices
        experts = with_forced(indices, forced)
        return scores.gather(1, experts), experts


class StageRoutes:
    """Passes the routes of micro-batches to a stage's routers, for the tokens of this process."""

    def __init__(self, model: nn.Module, arch: Architecture, grid: Grid, device: torch.device) -> None:
        layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        self._replays = [layer.router.router_replay for layer in layers]
        per_stage = arch.facts.num_layers // grid.pipeline
        of_experts = frozenset[int]() if arch.experts is None else arch.experts.layers
        self._first = sum(layer < grid.stage * per_stage for layer in of_experts)
        self._grid, self._device = grid, device

    def reset(self) -> None:
        """Forget what an earlier pass left."""
        for replay in self._replays:
            replay.reset()

    def begin(self, micro: MicroBatch, width: int) -> None:
        """Set the experts of a micro-batch whose sequences are padded to `width`."""
        if not self._replays:
            return
        table = route_table(micro.routes, width, self._device)
        own: list[Tensor | None] = [None] * len(self._replays)
        if table is not None:
            rows = table[:, own_positions(width, self._grid).to(self._device)].transpose(0, 1)
            if self._grid.sequence_parallel:
                rows = rows.chunk(self._grid.tensor)[self._grid.tensor_rank]
            of_layers = rows.flatten(0, 1).unbind(1)
            own = list(of_layers[self._first : self._first + len(own)])
        for replay, forced in zip(self._replays, own, strict=True):
            replay.begin(forced)
