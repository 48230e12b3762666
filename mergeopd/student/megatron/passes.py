"""Micro-batches through the pipeline: Megatron's schedule, with the fused loss on the last stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, repeat
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor, nn

from mergeopd.batch.micro_batch import MicroBatch, MicroBatches
from mergeopd.errors import NumericsError
from mergeopd.loss.buffers import Workspace
from mergeopd.loss.fused import Objective
from mergeopd.loss.heads import Head
from mergeopd.loss.kernel_choice import KernelName
from mergeopd.models.causal import padded
from mergeopd.student.loss import Measured, MicroStats, micro_loss
from mergeopd.student.megatron.grid import Grid
from mergeopd.student.megatron.router import StageRoutes
from mergeopd.student.megatron.sequence import TrainedRows, own_positions, width_multiple
from mergeopd.types import token_ids

# Run by a copy that has fewer micro-batches than passes to take part in: one token without loss.
_EMPTY = MicroBatch((), (), (token_ids((0,)),), (token_ids(()),), (), torch.zeros(0, 0), torch.zeros(0))


class Passes:
    """Runs micro-batches forwards, or forwards and backwards, through this rank's stage.

    `model` is the stage, wrapped so that gradients reach their buffers; `head` returns this rank's current
    rows of the head (last stage only).
    """

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        head: Callable[[], Head],
        routes: StageRoutes,
        grid: Grid,
        device: torch.device,
        kernel: KernelName,
    ) -> None:
        self._model, self._head, self._routes, self._grid, self._device = model, head, routes, grid, device
        self._schedule = get_forward_backward_func(pp_size=grid.pipeline)
        self._neighbours = P2PCommunicator(pp_group=grid.groups.pp, config=config)
        self._trained_rows = TrainedRows(grid)
        self._loss_group = grid.groups.tp_cp if grid.tensor * grid.context > 1 else None
        self._workspace, self._kernel = Workspace(), kernel

    def run(
        self,
        micro_batches: MicroBatches,
        per_token: Callable[[MicroBatch], Objective],
        what: Measured,
        *,
        backward: bool,
    ) -> tuple[MicroStats, ...]:
        """Return statistics of each micro-batch on the last stage; with `backward`, compute gradients too.

        Raises NumericsError on every rank when a distribution is not finite.
        """
        failures: list[str] = []

        def loss(
            micro: MicroBatch, rows: Tensor, width: int, hidden_sbd: Tensor
        ) -> tuple[Tensor, Tensor, Any]:
            # Megatron divides by the number of tokens; with 0 it leaves the sum unchanged.
            no_division = torch.zeros((), dtype=torch.int, device=self._device)
            try:
                value, stats = micro_loss(
                    self._trained_rows.of(hidden_sbd, rows, width),
                    self._head(),
                    micro,
                    per_token(micro),
                    replace(what, observe=None) if micro is _EMPTY else what,
                    self._workspace,
                    self._kernel,
                    self._loss_group,
                )
            except NumericsError as error:
                failures.append(str(error))
                # The other stages wait for gradients of every micro-batch; these are discarded.
                return hidden_sbd.sum() * 0.0, no_division, None
            return value, no_division, stats

        def step(batches: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
            micro = next(batches)
            multiple = width_multiple(self._grid)
            ids, rows = padded(micro.prompts, micro.responses, micro.trained, multiple=multiple)
            own = own_positions(ids.shape[1], self._grid)
            positions = own.expand(len(ids), -1)
            self._routes.begin(micro, ids.shape[1])
            hidden = model(ids[:, own].to(self._device), positions.to(self._device), None)
            return hidden, lambda output: loss(micro, rows, ids.shape[1], output)

        self._routes.reset()
        num = len(micro_batches)
        total = self._most(num) if self._grid.expert > 1 else num
        statistics = self._schedule(
            forward_step_func=step,
            data_iterator=chain(micro_batches, repeat(_EMPTY)),
            model=[self._model],
            num_microbatches=max(total, 1),
            seq_length=0,  # shapes travel with the tensors
            micro_batch_size=0,
            forward_only=not backward,
            p2p_communicator=self._neighbours,
            pg_collection=self._grid.groups,
        )
        _raise_together(failures)
        return tuple(statistics[:num]) if self._grid.is_last_stage else ()

    def _most(self, num: int) -> int:
        """Return the largest number of micro-batches of any copy: copies exchange tokens in every layer."""
        most = torch.tensor(num, device=self._device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)


def _raise_together(failures: Sequence[str]) -> None:
    """Raise NumericsError on all ranks with the first failure of any rank."""
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, failures[0] if failures else None)
    failure = next((words for words in everyone if words is not None), None)
    if failure is not None:
        raise NumericsError(failure)
