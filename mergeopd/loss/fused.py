"""The fused kernel: computes the loss and its gradients from hidden states, without a `[N, V]` matrix.

A chunk of tokens goes through four matrix products (student logits, teacher logits, dH, dW; one more for
each further teacher); between them, blocks of a few rows stay in the processor's cache while statistics,
objective and closed-form logit gradient are computed. Nothing is recomputed in backward: the gradients are
ready when the forward returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from mergeopd.loss import support as supports
from mergeopd.loss.buffers import Workspace
from mergeopd.loss.checks import (
    check_inputs,
    check_support,
    check_vocabulary,
    require_finite,
    require_labels,
)
from mergeopd.loss.divergence import Divergence
from mergeopd.loss.full_vocabulary import BlockScorer, BlockStats, Scored
from mergeopd.loss.gradients import HeadGradients
from mergeopd.loss.heads import Head, Hidden, Projection
from mergeopd.loss.kernel_choice import KernelName, choose_kernel
from mergeopd.loss.objective import LinearObjective
from mergeopd.loss.overlap import OVERLAP_K, Overlap, OverlapMeter
from mergeopd.loss.slicing import ChunkPlan, compute_dtype, slices
from mergeopd.loss.softmax import Softmaxes
from mergeopd.loss.support import Support
from mergeopd.loss.targets import Target
from mergeopd.loss.top_k import SupportScorer

if TYPE_CHECKING:
    from mergeopd.loss.triton.scorer import TritonScorer

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
    kernel: KernelName = "auto",
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
    kernel       for the work between the matrix products: `torch`, `triton`, or `auto` for Triton on a GPU
                 where it is installed. Supports, and targets without hidden states, always take `torch`

    Returns the loss, a scalar whose backward hands out gradients for `hidden_ND`, `head.weight` and
    `head.bias` (once differentiable; none are computed where nothing requires grad), and the statistics. The
    weight's gradient is added to `head.weight_grad` instead where the head has one. The host waits for the
    device once, at the end, and under a group also at the beginning.

    Raises ValueError for shapes, vocabularies or labels that do not fit, for divergences that the support
    or a target does not allow, and for a kernel that cannot run here; ArithmeticError for NaN or inf in the
    student's or a named target's statistics, or from the objective. Under a group all ranks raise.
    """
    dtype = compute_dtype(hidden_ND)
    is_exact = all(isinstance(target, Hidden) for target in targets)
    on_support = not is_exact or (support is not None and bool(divergences) and bool(targets))
    use_triton = choose_kernel(kernel, hidden_ND.device.type) == "triton" and not on_support
    check_inputs(hidden_ND, head, targets, labels_N, temperature, chunk_rows)
    all_ids, owners_N = check_vocabulary(labels_N, head, targets, group)
    check_support(targets, divergences, support, all_ids)
    gradients = HeadGradients(hidden_ND, head)
    workspace = Workspace() if workspace is None else workspace
    with torch.no_grad():
        projections = _project(hidden_ND, head, targets, temperature, workspace)
        student, vocab_size = projections[0], len(head.vocab)
        softmaxes = Softmaxes(student, projections[1:], head.vocab, group, labels_N)
        scorer: BlockScorer | SupportScorer | TritonScorer = BlockScorer(softmaxes, divergences)
        if on_support:
            scorer = SupportScorer(softmaxes, targets, divergences, support, all_ids)
        plan = ChunkPlan.of_torch(student.device, vocab_size, dtype, chunk_rows)
        if use_triton:
            from mergeopd.loss.triton.scorer import TritonScorer

            scorer = TritonScorer(softmaxes, divergences)
            plan = ChunkPlan.of_triton(len(projections), vocab_size, dtype, student.operand, chunk_rows)
        elif group is not None:  # collectives cost per block: the block is the whole chunk
            plan = replace(plan, block_rows=plan.rows)
        stats = _empty_stats(len(targets), len(divergences), hidden_ND)
        if top_ids is not None:
            num_ids = min(top_ids, len(all_ids))
            stats = replace(stats, top_ids=labels_N.new_empty(len(labels_N), num_ids, dtype=torch.int32))
        meter = None
        if overlap_rows is not None and targets:
            like = stats.loss
            meter = OverlapMeter.of(softmaxes, targets, overlap_rows, overlap_k, like, all_ids)
            stats = replace(stats, overlap=meter.overlap)
        run = _Run(
            labels_N, per_token, targets, divergences, softmaxes, scorer, plan, workspace, gradients, stats,
            all_ids, meter,
        )  # fmt: skip
        for rows in slices(0, hidden_ND.shape[0], plan.gradient_rows):
            run.chunk(rows)
        if meter is not None:
            meter.measure()
        run.finish()
        run.check(owners_N)
        if stats.top_ids is not None:
            stats = replace(stats, top_ids=stats.top_ids.cpu())
    return gradients.attach(stats.loss.sum()), stats


@dataclass(eq=False)
class _Run:
    """One call: the gradients and statistics that its chunks fill."""

    labels_N: Tensor
    per_token: Objective
    targets: Sequence[Target]
    divergences: Sequence[Divergence]
    softmaxes: Softmaxes
    scorer: BlockScorer | SupportScorer | TritonScorer
    plan: ChunkPlan
    workspace: Workspace
    gradients: HeadGradients
    stats: TokenStats
    all_ids: range
    meter: OverlapMeter | None
    gradient_sum: Tensor | float = 0.0

    def chunk(self, rows: slice) -> None:
        """Score the tokens of one product with the logit gradient, and add up the gradients."""
        student, num = self.softmaxes.student, rows.stop - rows.start
        dz = None
        if not self.plan.in_place and self.gradients.any:
            shape = (num, len(self.softmaxes.vocab))
            dz = self.workspace.take("dz", shape, student.operand, student.device)
        for part in slices(rows.start, rows.stop, self.plan.rows):
            logits = self._logits(part)
            if self.meter is not None:
                self.meter.add(logits[0], list(logits[1:]), part)
            own = logits[0] if dz is None else dz[part.start - rows.start : part.stop - rows.start]
            for block in slices(0, logits.shape[1], self.plan.block_rows):
                tokens = slice(part.start + block.start, part.start + block.stop)
                self._block(logits[:, block], own[block], tokens)
        self.gradients.add(student, own if dz is None else dz, rows)

    def _logits(self, rows: slice) -> Tensor:
        """Compute the raw logits of all models, `[models, n, V]`, in a buffer that the next call reuses."""
        student = self.softmaxes.student
        models = (student, *self.softmaxes.teachers)
        shape = (len(models), rows.stop - rows.start, len(self.softmaxes.vocab))
        logits = self.workspace.take("logits", shape, student.dtype, student.device)
        for model, out in zip(models, logits, strict=True):
            model.raw_logits(rows, out)
        return logits

    def _block(self, logits: Tensor, dz: Tensor, rows: slice) -> None:
        """Compute statistics and objective, and write the logit gradient."""
        scored = self.scorer.score(logits, rows, with_grad=self.gradients.any)
        if self.stats.top_ids is not None:
            self.stats.top_ids[rows] = self._top_ids(scored.student_ranking, self.stats.top_ids.shape[1])
        gradients: tuple[Tensor, Tensor | None] | None
        if isinstance(self.per_token, LinearObjective):
            by_divergence, by_logprob = self.per_token.derivatives(rows)
            dtype = self.stats.loss.dtype
            gradients = by_divergence.to(dtype), None if by_logprob is None else by_logprob.to(dtype)
            if isinstance(scored, Scored):
                self.sums[:, rows] = scored.sums
            else:
                self._keep(scored.stats, rows)
        else:
            stats = scored.stats
            self._keep(stats, rows)
            self.stats.loss[rows], gradients = self._objective(stats, rows)
        if gradients is not None and self.gradients.any:
            scored.logit_gradient(*gradients, out=dz)

    def _keep(self, stats: BlockStats, rows: slice) -> None:
        for name in ("divergence", "logprob_S", "logprob_T", "entropy_S", "entropy_T"):
            getattr(self.stats, name)[..., rows] = getattr(stats, name)

    def finish(self) -> None:
        """Compute the loss, and the statistics from sums, of an objective that did not need them."""
        if not isinstance(self.per_token, LinearObjective):
            return
        rows = slice(0, len(self.labels_N))
        if isinstance(self.scorer, BlockScorer):
            self._keep(self.scorer.stats(self.sums), rows)
        self.stats.loss[:] = self.per_token(self.stats, rows)
        for gradient in self.per_token.derivatives(rows):
            self.gradient_sum = self.gradient_sum + (0.0 if gradient is None else gradient.sum())

    @cached_property
    def sums(self) -> Tensor:
        """Sums of all tokens, `[R, N]`."""
        assert isinstance(self.scorer, BlockScorer)
        return self.stats.loss.new_empty(self.scorer.num_sums, len(self.labels_N))

    def _top_ids(self, logits_nV: Tensor, k: int) -> Tensor:
        if k >= len(self.all_ids):
            ids = torch.arange(self.all_ids.start, self.all_ids.stop, device=logits_nV.device)
            return ids.int().expand(logits_nV.shape[0], -1)
        [ids] = supports.top_ids([logits_nV], k, self.softmaxes.vocab, self.softmaxes.group)
        return ids.int()

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

    def check(self, owners_N: Tensor) -> None:
        """Raise ValueError for labels outside the vocabulary, ArithmeticError naming what is not finite.

        Waits for the device, once. Reduced scalars: all ranks agree.
        """
        stats, rows = self.stats, slice(0, len(self.labels_N))
        checked = [(stats.logprob_S + stats.entropy_S, "the student's logits")]
        for k, (logprob, entropy) in enumerate(zip(stats.logprob_T, stats.entropy_T, strict=True)):
            known = logprob + entropy if isinstance(self.targets[k], Hidden) else logprob
            checked.append((known, f"the logits of target {k}"))
            for divergence, values in zip(self.divergences, stats.divergence[k], strict=True):
                checked.append((values, f"{divergence} from target {k}"))
        checked.append((stats.loss, "the objective's value (its statistics are finite)"))
        total = torch.stack([values for values, _ in checked]).sum(0).sum() + self.gradient_sum
        if bool(torch.isfinite(total) & (owners_N == 1).all()):
            return
        require_labels(self.labels_N, owners_N, self.softmaxes.vocab, self.softmaxes.group)
        for values, what in checked:
            require_finite(values, rows, what)
        if not torch.isfinite(torch.as_tensor(self.gradient_sum)):
            raise ArithmeticError(
                "the objective's derivative is not finite, though its value is; "
                "look for torch.where around an infinite branch"
            )


def _project(
    hidden_ND: Tensor, head: Head, targets: Sequence[Target], temperature: float, workspace: Workspace
) -> list[Projection]:
    dtype = compute_dtype(hidden_ND)
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
