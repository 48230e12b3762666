"""`bridge_loss`: losses between models with different tokenizers, from hidden states, in chunks of groups."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from mergeopd.loss.buffers import Workspace
from mergeopd.loss.checks import check_hidden, check_labels, check_numbers, require_finite
from mergeopd.loss.cross_tokenizer.bridges import Bridge, Pieces, Projected
from mergeopd.loss.cross_tokenizer.dealing import Deal, Exchange, Shards
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
    group: dist.ProcessGroup | None = None,
    chunk_rows: int = 256,
    workspace: Workspace | None = None,
) -> tuple[Tensor, BridgeStats]:
    """Compute `sum_g weight_g temperature^2 D_g` over aligned groups, with D of the given bridge.

    hidden_SD   student's last hidden states `[N_S, d_S]`; float64 computes in float64, others in float32
    head        the student's head
    target      the teacher's hidden states `[N_T, d_T]` on its own tokens, and its head; a constant
    groups      rows of both sides that cover the same bytes
    labels_S    `[N_S]` the student's tokens, int64: row i predicts label i
    labels_T    `[N_T]` the teacher's
    bridge      `Gold`, `Uld`, `Projected` or `Pieces`; its tensors on the device of the hidden states
    weight_G    `[G]` weights, global denominators included; constants
    temperature divides both sides' logits
    group       ranks that share both vocabularies: each head is a shard, all else is replicated. dH comes
                back *partial* (sum it over the group), dW belongs to the shard
    chunk_rows  rows per side and matrix product; memory is about `chunk_rows * (V_S + V_T)` elements, under a
                group twice its share of them
    workspace   buffers to reuse over calls

    Returns the loss, whose backward returns gradients for `hidden_SD`, `head.weight` and `head.bias` (once
    differentiable; computed in this pass, as by `fused_loss`), and statistics.

    Raises ValueError for shapes, labels, groups or maps that do not fit, for shards that are not all of a
    vocabulary and for a group of more than `chunk_rows` rows; ArithmeticError for numbers that are not
    finite. Under a process group all ranks raise.
    """
    check_numbers(temperature, chunk_rows)
    workspace = Workspace() if workspace is None else workspace
    exchange = Exchange(group, workspace)
    sides = (("student", hidden_SD, head, labels_S), ("teacher", target.hidden, target.head, labels_T))
    shards = _check(sides, groups, bridge, weight_G, exchange)
    _check_sizes(groups, chunk_rows)
    # Only `Pieces` looks back from a group to the one before it.
    deal = Deal.of(groups, exchange.world, chunk_rows, keep_runs=isinstance(bridge, Pieces))
    order = torch.tensor(deal.order, device=weight_G.device, dtype=torch.int64)
    groups = groups.take(order)
    rows_S, rows_T = groups.rows()
    # Through autograd: rows in no group have gradient 0.
    grouped_S = _grouped(hidden_SD, rows_S)
    gradients = HeadGradients(grouped_S, head)
    with torch.no_grad():
        dtype = compute_dtype(hidden_SD)
        weight = weight_G.detach().to(dtype)[order] * temperature**2
        student = Projection("student", head, grouped_S, temperature, dtype, workspace)
        grouped_T = _grouped(target.hidden, rows_T)
        teacher = Projection("teacher", target.head, grouped_T, temperature, dtype, workspace)
        # Zeros: of every group, one rank knows the statistics.
        stats = weight.new_zeros(len(fields(BridgeStats)), len(weight))
        labels = labels_S[rows_S], labels_T[rows_T]
        run = _Run(
            (student, teacher),
            shards,
            exchange,
            groups,
            labels,
            weight,
            gradients,
            bridge.scorer(workspace),
            stats,
        )
        block_rows = None
        if hidden_SD.device.type == "cpu":  # elsewhere launches cost per block: the block is the whole chunk
            widest = max(one.size for one in shards)
            block_rows = _SPARSE_ROWS if isinstance(bridge, Projected) else rows_in_cache(widest, dtype)
        for step in deal.steps:
            run.step(step, block_rows)
        exchange.sum(stats)
        result = BridgeStats(*torch.empty_like(stats).index_copy_(1, order, stats))
        _check_finite(result)
    return gradients.attach(result.loss.sum()), result


@dataclass(frozen=True, eq=False)
class _Run:
    """One call: the gradients and statistics that its steps fill. Rows are ordered by group."""

    models: tuple[Projection, Projection]
    shards: tuple[Shards, Shards]
    exchange: Exchange
    groups: Groups
    labels: tuple[Tensor, Tensor]
    weight_G: Tensor
    gradients: HeadGradients
    scorer: RankScorer | ProjectionScorer | PieceScorer
    stats: Tensor  # in the order of the fields of BridgeStats

    def step(self, parts: tuple[slice, ...], block_rows: int | None) -> None:
        """Score a slice of groups for each rank: this one's own, after exchanging logits for whole rows."""
        (student, teacher), with_grad = self.models, self.gradients.any
        rows_S, rows_T = self._rows(slice(parts[0].start, parts[-1].stop))
        raw_S, raw_T = student.raw_logits(rows_S), teacher.raw_logits(rows_T)
        slope = student.take("slope", len(raw_S)) if with_grad and student.is_capped else None
        student.finish_logits(raw_S, slope)
        teacher.finish_logits(raw_T)
        own = parts[self.exchange.rank]
        own_S, own_T = self._rows(own)
        counts_S, counts_T = zip(*(map(_length, self._rows(part)) for part in parts), strict=True)
        logits_S = self.exchange.to_rows(raw_S, self.shards[0], counts_S, "student")
        logits_T = self.exchange.to_rows(raw_T, self.shards[1], counts_T, "teacher")
        for block in self._blocks(own, block_rows):
            block_S, block_T = self._rows(block)
            self._block(block, logits_S[_within(block_S, own_S)], logits_T[_within(block_T, own_T)])
        if with_grad:
            self.exchange.to_columns(logits_S, self.shards[0], counts_S, raw_S)
            if student.gain != 1.0:
                raw_S.mul_(student.gain)
            if slope is not None:
                raw_S.mul_(slope)
            self.gradients.add(student, raw_S, rows_S)

    def _block(self, groups: slice, logits_S: Tensor, logits_T: Tensor) -> None:
        (rows_S, rows_T), (labels_S, labels_T), own = self._rows(groups), self.labels, self.groups
        workspace = self.exchange.workspace
        s = Side.begin("student", logits_S, labels_S[rows_S], own.num_S[groups], workspace)
        t = Side.begin("teacher", logits_T, labels_T[rows_T], own.num_T[groups], workspace)
        follows = None if own.follows is None else own.follows[groups]
        weight = self.weight_G[groups]
        logprob_S, logprob_T = s.group_logprob(), t.group_logprob()
        scored = self.scorer.score(Block(s, t, follows, weight if self.gradients.any else None))
        self.stats[:, groups] = torch.stack(
            [
                scored.value,
                logprob_S,
                logprob_T,
                scored.matched_S,
                scored.matched_T,
                weight * scored.value,
            ]
        ).to(self.stats)

    def _blocks(self, own: slice, block_rows: int | None) -> list[slice]:
        if block_rows is None:
            return [own] if _length(own) else []
        num_S, num_T = self.groups.num_S[own].tolist(), self.groups.num_T[own].tolist()
        return [
            slice(own.start + part.start, own.start + part.stop)
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


def _check_finite(stats: BridgeStats) -> None:
    """Raise ArithmeticError naming whose numbers are not finite. Reduced over the group: all ranks agree."""
    for values, what in (
        (stats.logprob_S, "the student's log-probability"),
        (stats.logprob_T, "the teacher's log-probability"),
        (stats.value, "the bridge's value (log-probabilities are finite)"),
        (stats.loss, "the loss (its value is finite, its weight is not)"),
    ):
        require_finite(values, slice(0, len(values)), what, "groups")


def _length(rows: slice) -> int:
    return int(rows.stop - rows.start)


def _within(rows: slice, outer: slice) -> slice:
    return slice(rows.start - outer.start, rows.stop - outer.start)


def _grouped(hidden_ND: Tensor, rows: Tensor) -> Tensor:
    """Gather the rows group by group; without a copy if they are all rows in order."""
    if rows.shape[0] == hidden_ND.shape[0] and torch.equal(rows, torch.arange(len(rows), device=rows.device)):
        return hidden_ND
    return hidden_ND.index_select(0, rows)


def _check_sizes(groups: Groups, chunk_rows: int) -> None:
    """Raise ValueError for a group that does not fit into a chunk."""
    for g, pair in enumerate(zip(groups.num_S.tolist(), groups.num_T.tolist(), strict=True)):
        if max(pair) > chunk_rows:
            raise ValueError(
                f"group {g} has {pair[0]} student and {pair[1]} teacher rows, chunk_rows is {chunk_rows}; "
                "leave out such long groups (most likely a failed alignment), or raise chunk_rows"
            )


def _check(
    sides: tuple[tuple[str, Tensor, Head, Tensor], ...],
    groups: Groups,
    bridge: Bridge,
    weight_G: Tensor,
    exchange: Exchange,
) -> tuple[Shards, Shards]:
    """Return the partition of both vocabularies.

    Raises ValueError for hidden states, heads, labels, weights and groups that do not fit.
    """
    problem = None
    try:
        for name, hidden, head, _ in sides:
            check_hidden(f"the {name}", hidden, head, hidden.shape[0] if hidden.dim() else 0)
    except ValueError as error:
        problem = error
    # All else is the same on every rank.
    shards_S, shards_T = exchange.shards([(name, head) for name, _, head, _ in sides], problem)
    sizes = shards_S.size, shards_T.size
    if bridge.vocabularies is not None and bridge.vocabularies != sizes:
        raise ValueError(
            f"the bridge was made for {bridge.vocabularies[0]} student and {bridge.vocabularies[1]} teacher "
            f"ids, the heads score {sizes[0]} and {sizes[1]}; give each head its num_valid"
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
    return shards_S, shards_T
