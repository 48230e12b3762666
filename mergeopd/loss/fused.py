"""The fused kernel: computes the loss and its gradients from hidden states, without a `[N, V]` matrix.

A chunk of tokens goes through four matrix products (student logits, teacher logits, dH, dW; one more for
each further teacher); between them, blocks of a few rows stay in the processor's cache while statistics,
objective and closed-form logit gradient are computed. Nothing is recomputed in backward: the gradients are
ready when the forward returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from mergeopd.loss import support as supports
from mergeopd.loss.buffers import Workspace
from mergeopd.loss.checks import check_inputs, check_support, check_vocabulary, require_finite
from mergeopd.loss.divergence import Divergence
from mergeopd.loss.full_vocabulary import BlockScorer, BlockStats
from mergeopd.loss.gradients import HeadGradients
from mergeopd.loss.heads import Head, Hidden, Projection
from mergeopd.loss.overlap import OVERLAP_K, Overlap, OverlapMeter
from mergeopd.loss.slicing import compute_dtype, rows_in_cache, rows_in_chunk, slices
from mergeopd.loss.softmax import Softmaxes
from mergeopd.loss.support import Support
from mergeopd.loss.targets import Target
from mergeopd.loss.top_k import SupportScorer

Objective = Callable[[BlockStats, slice], Tensor]


@dataclass(frozen=True, eq=False)
class TokenStats(BlockStats):
    """Statistics of all N tokens, detached, and `loss [N]`, the objective's value per token.

    `top_ids` are the student's most probable ids `[N, k]`, int32 on the CPU; `overlap` is that of some tokens
    with the teachers. None where they were not asked for.
    """

    loss: Tensor
    top_ids: Tensor | None = None
    overlap: Overlap | None = None


def fused_loss(
    hidden_ND: Tensor,
    head: Head,
    targets: Sequence[Target],
    labels_N: Tensor,
    per_token: Objective,
    *,
    divergences: Sequence[Divergence],
    support: Support | None = None,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
    workspace: Workspace | None = None,
    top_ids: int | None = None,
    overlap_rows: Tensor | None = None,
    overlap_k: int = OVERLAP_K,
) -> tuple[Tensor, TokenStats]:
    """Sum over tokens of an objective on exact full-vocabulary statistics (DeepSeek-V4, 2606.19348 5.1.2).

    On a `support`, divergences alone are reduced to it; log-probabilities and entropies stay exact.

    hidden_ND    student's last hidden states `[N, d_S]`; float64 computes in float64, others in float32
    targets      K teachers, constants, may be none: `Hidden` (hidden states `[N, d_T]` and a head), `TopK`
                 (log-probabilities of its own or the student's k best, for a support of that model) or
                 `Sampled` (no divergences)
    labels_N     sampled token ids, int64
    per_token    `(stats, rows) -> [n]`: the loss of the tokens `rows`, already weighted and divided by its
                 global denominator. Called block by block with `divergence` and `logprob_S` requiring grad;
                 constants that it needs are sliced with `rows`. Under a group, called the same on every rank
    divergences  divergences to compute between the student and each teacher
    support      token ids to measure them on, one set for each teacher; None: the whole vocabulary
    temperature  divides both sides' logits in all statistics; a factor tau^2 is left to the objective
    group        ranks that share the vocabulary: heads are shards of ids from 0, all else is replicated. dH
                 comes back *partial* (sum it over the group), dW belongs to the shard
    chunk_rows   tokens per matrix product; None chooses by device. Memory is about
                 `chunk_rows * V * (1 + K)` elements
    workspace    buffers to reuse over calls
    top_ids      also return the student's so many most probable ids of every token (`TokenStats.top_ids`)
    overlap_rows also compare the `overlap_k` most probable ids of both models at these tokens: ascending,
                 int64, on the CPU (`TokenStats.overlap`). Loss and gradients stay the same, bit by bit

    Returns the loss, a scalar whose backward hands out gradients for `hidden_ND`, `head.weight` and
    `head.bias` (once differentiable; none are computed where nothing requires grad), and the statistics. The
    weight's gradient is added to `head.weight_grad` instead where the head has one.

    Raises ValueError for shapes, vocabularies or labels that do not fit, and for divergences that the support
    or a target does not allow; ArithmeticError for NaN or inf in the student's or a named target's
    statistics, or from the objective. Under a group all ranks raise.
    """
    if chunk_rows is None:
        chunk_rows = rows_in_chunk(hidden_ND.device, len(head.vocab), compute_dtype(hidden_ND))
    check_inputs(hidden_ND, head, targets, labels_N, temperature, chunk_rows)
    all_ids = check_vocabulary(labels_N, head, targets, group)
    check_support(targets, divergences, support, all_ids)
    gradients = HeadGradients(hidden_ND, head)
    with torch.no_grad():
        projections = _project(hidden_ND, head, targets, temperature, workspace)
        softmaxes = Softmaxes(projections[0], projections[1:], head.vocab, group)
        scorer: BlockScorer | SupportScorer = BlockScorer(softmaxes, divergences)
        is_exact = all(isinstance(target, Hidden) for target in targets)
        if not is_exact or (support is not None and divergences and targets):
            scorer = SupportScorer(softmaxes, targets, divergences, support, all_ids)
        stats = _empty_stats(len(targets), len(divergences), hidden_ND)
        if top_ids is not None:
            num_ids = min(top_ids, len(all_ids))
            stats = replace(stats, top_ids=torch.empty(len(labels_N), num_ids, dtype=torch.int32))
        meter = None
        if overlap_rows is not None and targets:
            like = stats.loss
            meter = OverlapMeter.of(softmaxes, targets, overlap_rows, overlap_k, like, all_ids)
            stats = replace(stats, overlap=meter.overlap)
        run = _Run(
            labels_N, per_token, targets, divergences, softmaxes, scorer, gradients, stats, all_ids, meter
        )
        for rows in slices(0, hidden_ND.shape[0], chunk_rows):
            run.chunk(rows)
        if meter is not None:
            meter.measure()
    return gradients.attach(stats.loss.sum()), stats


@dataclass(eq=False)
class _Run:
    """One call: the gradients and statistics that its chunks fill."""

    labels_N: Tensor
    per_token: Objective
    targets: Sequence[Target]
    divergences: Sequence[Divergence]
    softmaxes: Softmaxes
    scorer: BlockScorer | SupportScorer
    gradients: HeadGradients
    stats: TokenStats
    all_ids: range
    meter: OverlapMeter | None
    gradient_sum: Tensor | float = 0.0

    def chunk(self, rows: slice) -> None:
        student, num = self.softmaxes.student, rows.stop - rows.start
        logits_S = student.raw_logits(rows)
        logits_T = [teacher.raw_logits(rows) for teacher in self.softmaxes.teachers]
        if self.meter is not None:
            self.meter.add(logits_S, logits_T, rows)
        # Collectives and kernel launches cost per block: with either, the block is the whole chunk.
        in_cache = self.softmaxes.group is None and logits_S.device.type == "cpu"
        for block in slices(0, num, rows_in_cache(logits_S.shape[1], logits_S.dtype) if in_cache else num):
            tokens = slice(rows.start + block.start, rows.start + block.stop)
            self._block(logits_S[block], [logits[block] for logits in logits_T], tokens)
        self._check_finite(rows)
        self.gradients.add(student, logits_S, rows)

    def _block(self, logits_S: Tensor, logits_T: Sequence[Tensor], rows: slice) -> None:
        """Compute statistics and objective, and overwrite the student's logits with the logit gradient."""
        scored = self.scorer.score(logits_S, logits_T, self.labels_N, rows, with_grad=self.gradients.any)
        block, stats = scored.stats, self.stats
        for name in ("divergence", "logprob_S", "logprob_T", "entropy_S", "entropy_T"):
            getattr(stats, name)[..., rows] = getattr(block, name)
        if stats.top_ids is not None:
            stats.top_ids[rows] = self._top_ids(scored.block.logits[0], stats.top_ids.shape[1])
        loss, gradients = self._objective(block, rows)
        stats.loss[rows] = loss
        if gradients is not None:
            scored.logit_gradient(*gradients, out=logits_S)

    def _top_ids(self, logits_nV: Tensor, k: int) -> Tensor:
        if k >= len(self.all_ids):
            return torch.tensor(self.all_ids, dtype=torch.int32).expand(logits_nV.shape[0], -1)
        [ids] = supports.top_ids([logits_nV], k, self.softmaxes.vocab, self.softmaxes.group)
        return ids.int().cpu()

    def _objective(self, stats: BlockStats, rows: slice) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        num = rows.stop - rows.start
        if not self.gradients.any:
            return _checked(self.per_token(stats, rows), num), None
        leaves = (stats.divergence.requires_grad_(), stats.logprob_S.requires_grad_())
        with torch.enable_grad():
            loss = _checked(self.per_token(stats, rows), num)
            if not loss.requires_grad:  # a constant: no gradient from these tokens
                return loss, (torch.zeros_like(leaves[0]), torch.zeros_like(leaves[1]))
            total = loss.sum()
        gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        for gradient in gradients:
            self.gradient_sum = self.gradient_sum + gradient.sum()
        return loss.detach(), (gradients[0], gradients[1])

    def _check_finite(self, rows: slice) -> None:
        """Raise ArithmeticError naming whose numbers are not finite. Reduced scalars: all ranks agree."""
        stats = self.stats
        require_finite(stats.logprob_S[rows] + stats.entropy_S[rows], rows, "the student's logits")
        for k, (logprob, entropy) in enumerate(zip(stats.logprob_T, stats.entropy_T, strict=True)):
            known = logprob[rows] + entropy[rows] if isinstance(self.targets[k], Hidden) else logprob[rows]
            require_finite(known, rows, f"the logits of target {k}")
            for d, divergence in enumerate(self.divergences):
                require_finite(stats.divergence[k, d, rows], rows, f"{divergence} from target {k}")
        require_finite(stats.loss[rows], rows, "the objective's value (its statistics are finite)")
        if not torch.isfinite(torch.as_tensor(self.gradient_sum)):
            raise ArithmeticError(
                f"the objective's derivative is not finite in the tokens {rows.start} to {rows.stop - 1}, "
                "though its value is; look for torch.where around an infinite branch"
            )


def _project(
    hidden_ND: Tensor, head: Head, targets: Sequence[Target], temperature: float, workspace: Workspace | None
) -> list[Projection]:
    dtype = compute_dtype(hidden_ND)
    workspace = Workspace() if workspace is None else workspace
    exact = [(k, target) for k, target in enumerate(targets) if isinstance(target, Hidden)]
    sides = [("student", head, hidden_ND), *((f"teacher{k}", t.head, t.hidden) for k, t in exact)]
    return [Projection(*side, temperature, dtype, workspace) for side in sides]


def _empty_stats(num_targets: int, num_divergences: int, hidden_ND: Tensor) -> TokenStats:
    num, dtype = hidden_ND.shape[0], compute_dtype(hidden_ND)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden_ND.device)

    return TokenStats(
        divergence=empty(num_targets, num_divergences, num),
        logprob_S=empty(num),
        logprob_T=empty(num_targets, num),
        entropy_S=empty(num),
        entropy_T=empty(num_targets, num),
        loss=empty(num),
    )


def _checked(loss: Tensor, num: int) -> Tensor:
    if loss.shape != (num,):
        raise ValueError(
            f"per_token must return one loss per token, [{num}], but returned {list(loss.shape)}"
        )
    return loss
