"""`bridge_loss`: losses between models with different tokenizers, from hidden states, in chunks of groups."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mergeopd.loss.buffers import Workspace
from mergeopd.loss.checks import require_finite
from mergeopd.loss.cross_tokenizer.bridges import Bridge, Projected
from mergeopd.loss.cross_tokenizer.groups import Groups, portions
from mergeopd.loss.cross_tokenizer.rows import Block, Scored, Scorer
from mergeopd.loss.gradients import HeadGradients
from mergeopd.loss.heads import Head, Hidden, Projection
from mergeopd.loss.slicing import compute_dtype, rows_in_cache

# A sparse product reads the vocabulary's rows in scattered order: each should fill a cache line.
_SPARSE_ROWS = 16


@dataclass(frozen=True, eq=False)
class BridgeStats(Scored):
    """Per group `[G]`, detached.

    value                 the bridge's measure, without weight and temperature
    logprob_S, logprob_T  chain-rule log-probability of the group's tokens, in nats, at the loss temperature
    matched_S, matched_T  mass of the merged distributions on tokens compared by identity; 0 for `Uld`
    loss                  `weight * temperature^2 * value`
    """

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
    _check(hidden_SD, head, target, groups, bridge, weight_G, temperature)
    _check_labels("student", labels_S, head, hidden_SD.shape[0])
    _check_labels("teacher", labels_T, target.head, target.hidden.shape[0])
    portions_in_chunks = _plan(groups, chunk_rows)
    rows_S, rows_T = groups.student_rows(), groups.teacher_rows()
    # Through autograd: rows in no group have gradient 0.
    grouped_S = _grouped(hidden_SD, rows_S)
    gradients = HeadGradients(grouped_S, head)
    with torch.no_grad():
        grouped_T = Hidden(_grouped(target.hidden, rows_T), target.head)
        labels = (labels_S[rows_S], labels_T[rows_T])
        weight = weight_G.detach().to(compute_dtype(hidden_SD)) * temperature**2
        run = _Run(grouped_S, head, grouped_T, groups, labels, weight, temperature, gradients, workspace)
        run.score(bridge, portions_in_chunks)
        stats = run.stats
    return gradients.attach(stats.loss.sum()), stats


class _Run:
    """One call: the gradients and statistics that its chunks fill. Rows are ordered by group."""

    def __init__(
        self,
        hidden_SD: Tensor,
        head: Head,
        target: Hidden,
        groups: Groups,
        labels: tuple[Tensor, Tensor],
        weight_G: Tensor,
        temperature: float,
        gradients: HeadGradients,
        workspace: Workspace | None,
    ) -> None:
        dtype = compute_dtype(hidden_SD)
        self._workspace = Workspace() if workspace is None else workspace
        self._student = Projection("student", head, hidden_SD, temperature, dtype, self._workspace)
        self._teacher = Projection("teacher", target.head, target.hidden, temperature, dtype, self._workspace)
        self._is_cpu = hidden_SD.device.type == "cpu"
        self._widest = max(len(head.vocab), len(target.head.vocab))
        self._groups, self._labels, self._weight_G, self._gradients = groups, labels, weight_G, gradients
        self._stop_S, self._stop_T = groups.num_S.cumsum(0).tolist(), groups.num_T.cumsum(0).tolist()
        self.stats = BridgeStats(*(torch.empty_like(weight_G) for _ in fields(BridgeStats)))

    def score(self, bridge: Bridge, chunks: list[slice]) -> None:
        scorer = bridge.scorer(self._student, self._teacher, self._workspace)
        block_rows = None
        if self._is_cpu:  # elsewhere launches cost per block: the block is the whole chunk
            is_sparse = isinstance(bridge, Projected)
            block_rows = _SPARSE_ROWS if is_sparse else rows_in_cache(self._widest, self._weight_G.dtype)
        for chunk in chunks:
            rows_S, rows_T = self._rows(chunk)
            logits_S, logits_T = self._student.raw_logits(rows_S), self._teacher.raw_logits(rows_T)
            for groups in self._blocks(chunk, block_rows):
                own_S, own_T = self._rows(groups)
                self._block(
                    scorer, groups, logits_S[_within(own_S, rows_S)], logits_T[_within(own_T, rows_T)]
                )
            self._check_finite(chunk)
            if self._gradients.any:
                self._gradients.add(self._student, logits_S, rows_S)

    def _block(self, scorer: Scorer, groups: slice, raw_S: Tensor, raw_T: Tensor) -> None:
        rows_S, rows_T = self._rows(groups)
        block = Block(
            raw_S,
            raw_T,
            self._labels[0][rows_S],
            self._labels[1][rows_T],
            self._groups.num_S[groups],
            self._groups.num_T[groups],
            None if self._groups.follows is None else self._groups.follows[groups],
            self._weight_G[groups] if self._gradients.any else None,
        )
        scored = scorer.score(block)
        for field in fields(Scored):
            getattr(self.stats, field.name)[groups] = getattr(scored, field.name)
        self.stats.loss[groups] = self._weight_G[groups] * scored.value

    def _blocks(self, chunk: slice, block_rows: int | None) -> list[slice]:
        if block_rows is None:
            return [chunk]
        num_S, num_T = self._groups.num_S[chunk].tolist(), self._groups.num_T[chunk].tolist()
        return [
            slice(chunk.start + part.start, chunk.start + part.stop)
            for part in portions(num_S, num_T, block_rows)
        ]

    def _rows(self, groups: slice) -> tuple[slice, slice]:
        before = groups.start - 1
        first_S, first_T = (self._stop_S[before], self._stop_T[before]) if groups.start else (0, 0)
        return slice(first_S, self._stop_S[groups.stop - 1]), slice(first_T, self._stop_T[groups.stop - 1])

    def _check_finite(self, chunk: slice) -> None:
        stats = self.stats
        require_finite(stats.logprob_S[chunk], chunk, "the student's log-probability", "groups")
        require_finite(stats.logprob_T[chunk], chunk, "the teacher's log-probability", "groups")
        require_finite(
            stats.value[chunk], chunk, "the bridge's value (log-probabilities are finite)", "groups"
        )
        require_finite(
            stats.loss[chunk], chunk, "the loss (its value is finite, its weight is not)", "groups"
        )


def _within(rows: slice, outer: slice) -> slice:
    return slice(rows.start - outer.start, rows.stop - outer.start)


def _grouped(hidden_ND: Tensor, rows: Tensor) -> Tensor:
    """Gather the rows group by group; without a copy if they are all rows in order."""
    if rows.shape[0] == hidden_ND.shape[0] and torch.equal(rows, torch.arange(len(rows), device=rows.device)):
        return hidden_ND
    return hidden_ND.index_select(0, rows)


def _plan(groups: Groups, chunk_rows: int) -> list[slice]:
    """Cut the groups into slices that fit into chunks. Raises ValueError for a group that does not."""
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}, must be at least 1")
    num_S, num_T = groups.num_S.tolist(), groups.num_T.tolist()
    for g, pair in enumerate(zip(num_S, num_T, strict=True)):
        if max(pair) > chunk_rows:
            raise ValueError(
                f"group {g} has {pair[0]} student and {pair[1]} teacher rows, chunk_rows is {chunk_rows}; "
                "leave out such long groups (most likely a failed alignment), or raise chunk_rows"
            )
    return list(portions(num_S, num_T, chunk_rows))


def _check(
    hidden_SD: Tensor,
    head: Head,
    target: Hidden,
    groups: Groups,
    bridge: Bridge,
    weight_G: Tensor,
    temperature: float,
) -> None:
    """Raise ValueError for shapes, vocabularies and numbers that do not fit."""
    for name, hidden, its_head in (("student", hidden_SD, head), ("teacher", target.hidden, target.head)):
        if hidden.dim() != 2 or hidden.shape[1] != its_head.weight.shape[1]:
            raise ValueError(
                f"the {name}'s hidden states are {list(hidden.shape)}, "
                f"its head needs [N, {its_head.weight.shape[1]}]"
            )
        if its_head.vocab.start or not len(its_head.vocab):
            raise ValueError(
                f"the {name}'s head scores token ids [{its_head.vocab.start}, {its_head.vocab.stop}); "
                "a bridge needs the whole vocabulary on one rank: use no tensor parallelism with bridges"
            )
    sizes = (len(head.vocab), len(target.head.vocab))
    if bridge.vocabularies is not None and bridge.vocabularies != sizes:
        raise ValueError(
            f"the bridge was made for {bridge.vocabularies[0]} student and {bridge.vocabularies[1]} teacher "
            f"ids, the heads score {sizes[0]} and {sizes[1]}; give each head its num_valid, and no shard"
        )
    if weight_G.shape != (len(groups),):
        raise ValueError(f"weight_G must be [{len(groups)}], one for each group, got {list(weight_G.shape)}")
    if not temperature > 0.0:
        raise ValueError(f"temperature is {temperature}, must be positive")
    groups.check(hidden_SD.shape[0], target.hidden.shape[0])


def _check_labels(name: str, labels: Tensor, head: Head, num: int) -> None:
    if labels.shape != (num,) or labels.dtype != torch.int64:
        raise ValueError(
            f"the {name}'s labels must be int64 [{num}], got {labels.dtype} {list(labels.shape)}"
        )
    outside = (labels < 0) | (labels >= len(head.vocab))
    if outside.any():
        token = int(outside.nonzero()[0])
        raise ValueError(
            f"the {name}'s label {token} is {int(labels[token])}, "
            f"not in its vocabulary [0, {len(head.vocab)})"
        )
