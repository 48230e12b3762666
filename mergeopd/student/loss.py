"""Loss of one micro-batch: the fused loss, plus a bridge for each teacher with another tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mergeopd.batch.micro_batch import MicroBatch
from mergeopd.errors import NumericsError
from mergeopd.loss.buffers import Workspace
from mergeopd.loss.cross_tokenizer import BridgeStats, bridge_loss
from mergeopd.loss.divergence import Divergence
from mergeopd.loss.full_vocabulary import BlockStats
from mergeopd.loss.fused import Objective, TokenStats, fused_loss
from mergeopd.loss.heads import Head, Hidden
from mergeopd.loss.kernel_choice import KernelName
from mergeopd.loss.objective import DistillationObjective
from mergeopd.loss.support import Support
from mergeopd.transfers import to_device

Observe = Callable[[MicroBatch, Hidden], None]
"""Gets a micro-batch, the hidden states that predict its trained tokens, and this rank's rows of the head."""


@dataclass(frozen=True)
class Measured:
    """What a pass measures, equal for all its micro-batches: arguments of `fused_loss`, and an observer.

    `observe` is called on every rank that computes losses, without a gradient; it must not be collective.
    """

    divergences: Sequence[Divergence]
    support: Support | None
    temperature: float
    observe: Observe | None = None
    top_ids: int | None = None

    @classmethod
    def of(cls, objective: DistillationObjective, observe: Observe | None = None) -> Measured:
        return cls(objective.divergences, objective.support, objective.temperature, observe)


def check_norm(norm: float) -> None:
    """Raise NumericsError for a gradient whose norm is not finite."""
    if not math.isfinite(norm):
        raise NumericsError(
            "the gradient is NaN or infinite; the weights are unchanged. "
            "Lower optimizer.lr, or use student.dtype: float32"
        )


def no_loss(stats: BlockStats, rows: slice) -> Tensor:
    """Return a loss of 0 for every token: the objective of a pass for statistics alone."""
    return torch.zeros_like(stats.logprob_S)


@dataclass(frozen=True, eq=False)
class MicroStats(TokenStats):
    """Statistics of a micro-batch's trained tokens, and of the groups of each bridged teacher, by name."""

    bridged: tuple[tuple[str, BridgeStats], ...] = ()


def micro_loss(
    hidden_ND: Tensor,
    head: Head,
    micro: MicroBatch,
    per_token: Objective,
    what: Measured,
    workspace: Workspace,
    kernel: KernelName,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, MicroStats]:
    """Compute the loss of a micro-batch and its statistics; `hidden_ND` has a row for each trained token.

    Raises NumericsError, with the names of the teachers, for distributions that are not finite.
    """
    labels = to_device(torch.as_tensor(np.concatenate(micro.labels), dtype=torch.long), hidden_ND.device)
    try:
        loss, stats = fused_loss(
            hidden_ND,
            head,
            micro.targets,
            labels,
            per_token,
            divergences=what.divergences,
            support=what.support,
            temperature=what.temperature,
            group=group,
            workspace=workspace,
            top_ids=what.top_ids,
            overlap_rows=micro.overlap_rows,
            kernel=kernel,
        )
    except ArithmeticError as error:
        raise NumericsError(micro.with_teacher_names(error)) from error
    bridge_stats: list[tuple[str, BridgeStats]] = []
    for bridged in micro.bridged:
        try:
            value, of_groups = bridge_loss(
                hidden_ND,
                head,
                bridged.target,
                bridged.groups,
                labels,
                bridged.labels,
                bridged.measure,
                bridged.weight_G,
                temperature=what.temperature,
                group=group,
                workspace=workspace,
            )
        except ArithmeticError as error:
            raise NumericsError(f"teacher {bridged.teacher}: {error}") from error
        loss = loss + value
        bridge_stats.append((bridged.teacher, of_groups))
    if what.observe is not None:
        what.observe(micro, Hidden(hidden_ND.detach(), head))
    return loss, MicroStats(**vars(stats), bridged=tuple(bridge_stats))
