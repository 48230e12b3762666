"""`bridge_loss`: losses between models with different tokenizers, from hidden states, in chunks of groups."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from mergeopd.loss.buffers import Workspace
from mergeopd.loss.checks import check_hidden, check_labels, check_numbers, require_finite
from mergeopd.loss.cross_tokenizer.bridges import Bridge, Projected
from mergeopd.loss.cross_tokenizer.gold import RankScorer
from mergeopd.loss.cross_tokenizer.groups import Groups, portions
from mergeopd.loss.cross_tokenizer.pieces import PieceScorer
from mergeopd.loss.cross_tokenizer.projection import ProjectionScorer
from mergeopd.loss.cross_tokenizer.rows import Block, Side
from mergeopd.loss.gradients import HeadGradients
from mergeopd.loss.heads import Head, Hidden, Projection
from mergeopd.loss.slicing import compute_dtype, rows_in_cache

# A sparse product reads the vocabulary's rows in scattered order: each should fill a cache line.
_SPARSE_ROWS = 16


@dataclass(frozen=True, eq=False)
class BridgeStats:
    """Per group `[G]`, detached.

    value                 the bridge's measure, without weight and temperature
    logprob_S, logprob_T  chain-rule log-probability of the group's tokens, in nats, at the loss temperature
    matched_S, matched_T  mass of the merged distributions on tokens compared by identity; 0 for `Uld`
    loss                  `weight * temperature^2 * value`
    """

    value: Tensor
    logprob_S: Tensor
    logprob_T: Tensor
    matched_S: Tensor
    matched_T: Tensor
    loss: Tensor


def bridge_loss(
    hidden_SD: Tensor,
    head: Head,
    target: Hidden,
    groups: Groups,
    labels_S: Tensor,
    labels_T: Tensor,
    bridge: Bridge,
    weight_G: Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: int = 256,
    workspace: Workspace | None = None,
) -> tuple[Tensor, BridgeStats]:
    """Compute `sum_g weight_g temperature^2 D_g` over aligned groups, with D of the given bridge.

    hidden_SD   student's last hidden states `[N_S, d_S]`; float64 computes in float64, others in float32
    head        the student's whole head; a shard of a vocabulary is refused
    target      the teacher's hidden states `[N_T, d_T]` on its own tokens, and its head; a constant
    groups      rows of both sides that cover the same bytes
    labels_S    `[N_S]` the student's tokens, int64: row i predicts label i
    labels_T    `[N_T]` the teacher's
    bridge      `Gold`, `Uld`, `Projected` or `Pieces`; its tensors on the device of the hidden states
    weight_G    `[G]` weights, global denominators included; constants
    temperature divides both sides' logits
    chunk_rows  rows per side and matrix product; memory is about `chunk_rows * (V_S + V_T)` elements
    workspace   buffers to reuse over calls

    Returns the loss, whose backward returns gradients for `hidden_SD`, `head.weight` and `head.bias` (once
    differentiable; computed in this pass, as by `fused_loss`), and statistics.

    Raises ValueError for shapes, labels, groups or maps that do not fit, for a sharded vocabulary and for a
    group of more than `chunk_rows` rows; ArithmeticError for numbers that are not finite.
    """
    check_numbers(temperature, chunk_rows)
    sides = (("student", hidden_SD, head, labels_S), ("teacher", target.hidden, target.head, labels_T))
    _check(sides, groups, bridge, weight_G)
    chunks = _plan(groups, chunk_rows)
    workspace = Workspace() if workspace is None else workspace
    rows_S, rows_T = groups.rows()
    # Through autograd: rows in no group have gradient 0.
    grouped_S = _grouped(hidden_SD, rows_S)
    gradients = HeadGradients(grouped_S, head)
    with torch.no_grad():
        dtype = compute_dtype(hidden_SD)
        weight = weight_G.detach().to(dtype) * temperature**2
        student = Projection("student", head, grouped_S, temperature, dtype, workspace)
        grouped_T = _grouped(target.hidden, rows_T)
        teacher = Projection("teacher", target.head, grouped_T, temperature, dtype, workspace)
        stats = BridgeStats(*(torch.empty_like(weight) for _ in fields(BridgeStats)))
        labels = labels_S[rows_S], labels_T[rows_T]
        run = _Run(student, teacher, groups, labels, weight, gradients, bridge.scorer(workspace), stats)
        block_rows = None
        if hidden_SD.device.type == "cpu":  # elsewhere launches cost per block: the block is the whole chunk
            widest = max(len(head.vocab), len(target.head.vocab))
            block_rows = _SPARSE_ROWS if isinstance(bridge, Projected) else rows_in_cache(widest, dtype)
        for chunk in chunks:
            run.chunk(chunk, block_rows)
    return gradients.attach(stats.loss.sum()), stats


@dataclass(frozen=True, eq=False)
class _Run:
    """One call: the gradients and statistics that its chunks fill. Rows are ordered by group."""

    student: Projection
    teacher: Projection
    groups: Groups
    labels: tuple[Tensor, Tensor]
    weight_G: Tensor
    gradients: HeadGradients
    scorer: RankScorer | ProjectionScorer | PieceScorer
    stats: BridgeStats

    def chunk(self, chunk: slice, block_rows: int | None) -> None:
        rows_S, rows_T = self._rows(chunk)
        logits_S, logits_T = self.student.raw_logits(rows_S), self.teacher.raw_logits(rows_T)
        for groups in self._blocks(chunk, block_rows):
            own_S, own_T = self._rows(groups)
            self._block(groups, logits_S[_within(own_S, rows_S)], logits_T[_within(own_T, rows_T)])
        self._check_finite(chunk)
        if self.gradients.any:
            self.gradients.add(self.student, logits_S, rows_S)

    def _block(self, groups: slice, raw_S: Tensor, raw_T: Tensor) -> None:
        (rows_S, rows_T), (labels_S, labels_T), own = self._rows(groups), self.labels, self.groups
        with_grad, stats = self.gradients.any, self.stats
        s = Side.begin(self.student, raw_S, labels_S[rows_S], own.num_S[groups], with_slope=with_grad)
        t = Side.begin(self.teacher, raw_T, labels_T[rows_T], own.num_T[groups], with_slope=False)
        follows = None if own.follows is None else own.follows[groups]
        stats.logprob_S[groups], stats.logprob_T[groups] = s.group_logprob(), t.group_logprob()
        scored = self.scorer.score(Block(s, t, follows, self.weight_G[groups] if with_grad else None))
        stats.value[groups], stats.matched_S[groups], stats.matched_T[groups] = scored
        stats.loss[groups] = self.weight_G[groups] * scored.value

    def _blocks(self, chunk: slice, block_rows: int | None) -> list[slice]:
        if block_rows is None:
            return [chunk]
        num_S, num_T = self.groups.num_S[chunk].tolist(), self.groups.num_T[chunk].tolist()
        return [
            slice(chunk.start + part.start, chunk.start + part.stop)
            for part in portions(num_S, num_T, block_rows)
        ]

    def _rows(self, groups: slice) -> tuple[slice, slice]:
        stops_S, stops_T = self._stops
        return slice(stops_S[groups.start], stops_S[groups.stop]), slice(
            stops_T[groups.start], stops_T[groups.stop]
        )

    @cached_property
    def _stops(self) -> tuple[list[int], list[int]]:
        """Return one past the last row of the groups before each one, on both sides."""
        return [0, *self.groups.num_S.cumsum(0).tolist()], [0, *self.groups.num_T.cumsum(0).tolist()]

    def _check_finite(self, chunk: slice) -> None:
        stats = self.stats
        for values, what in (
            (stats.logprob_S, "the student's log-probability"),
            (stats.logprob_T, "the teacher's log-probability"),
            (stats.value, "the bridge's value (log-probabilities are finite)"),
            (stats.loss, "the loss (its value is finite, its weight is not)"),
        ):
            require_finite(values[chunk], chunk, what, "groups")


def _within(rows: slice, outer: slice) -> slice:
    return slice(rows.start - outer.start, rows.stop - outer.start)


def _grouped(hidden_ND: Tensor, rows: Tensor) -> Tensor:
    """Gather the rows group by group; without a copy if they are all rows in order."""
    if rows.shape[0] == hidden_ND.shape[0] and torch.equal(rows, torch.arange(len(rows), device=rows.device)):
        return hidden_ND
    return hidden_ND.index_select(0, rows)


def _plan(groups: Groups, chunk_rows: int) -> list[slice]:
    """Cut the groups into slices that fit into chunks. Raises ValueError for a group that does not."""
    num_S, num_T = groups.num_S.tolist(), groups.num_T.tolist()
    for g, pair in enumerate(zip(num_S, num_T, strict=True)):
        if max(pair) > chunk_rows:
            raise ValueError(
                f"group {g} has {pair[0]} student and {pair[1]} teacher rows, chunk_rows is {chunk_rows}; "
                "leave out such long groups (most likely a failed alignment), or raise chunk_rows"
            )
    return list(portions(num_S, num_T, chunk_rows))


def _check(
    sides: tuple[tuple[str, Tensor, Head, Tensor], ...], groups: Groups, bridge: Bridge, weight_G: Tensor
) -> None:
    """Raise ValueError for hidden states, heads, labels, weights and groups that do not fit."""
    for name, hidden, head, _ in sides:
        check_hidden(f"the {name}", hidden, head, hidden.shape[0] if hidden.dim() else 0)
        if head.vocab.start or not len(head.vocab):
            raise ValueError(
                f"the {name}'s head scores token ids [{head.vocab.start}, {head.vocab.stop}); "
                "a bridge needs the whole vocabulary on one rank: use no tensor parallelism with bridges"
            )
    sizes = tuple(len(head.vocab) for _, _, head, _ in sides)
    if bridge.vocabularies is not None and bridge.vocabularies != sizes:
        raise ValueError(
            f"the bridge was made for {bridge.vocabularies[0]} student and {bridge.vocabularies[1]} teacher "
            f"ids, the heads score {sizes[0]} and {sizes[1]}; give each head its num_valid, and no shard"
        )
    if weight_G.shape != (len(groups),):
        raise ValueError(f"weight_G must be [{len(groups)}], one for each group, got {list(weight_G.shape)}")
    for (name, hidden, _, labels), size in zip(sides, sizes, strict=True):
        check_labels(f"the {name}'s labels", labels, hidden.shape[0])
        outside = ((labels < 0) | (labels >= size)).nonzero()
        if len(outside):
            token = int(outside[0])
            raise ValueError(
                f"the {name}'s label {token} is {int(labels[token])}, not in its vocabulary [0, {size})"
            )
    groups.check(*(hidden.shape[0] for _, hidden, _, _ in sides))
