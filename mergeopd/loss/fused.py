"""The fused kernel: computes the loss and its gradients from hidden states, without a `[N, V]` matrix.

A chunk of tokens goes through four matrix products (student logits, teacher logits, dH, dW; one more for
each further teacher); between them, blocks of a few rows stay in the processor's cache while statistics,
objective and closed-form logit gradient are computed. Nothing is recomputed in backward: the gradients are
ready when the forward returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mergeopd.loss.buffers import Workspace
from mergeopd.loss.checks import check_inputs, check_support, check_vocabulary, require_finite
from mergeopd.loss.divergence import Divergence
from mergeopd.loss.full_vocabulary import BlockScorer, BlockStats, Scorer
from mergeopd.loss.gradients import HeadGradients
from mergeopd.loss.heads import Head, Hidden, Projection
from mergeopd.loss.slicing import compute_dtype, rows_in_cache, rows_in_chunk, slices
from mergeopd.loss.softmax import Softmaxes
from mergeopd.loss.support import Support
from mergeopd.loss.targets import Target
from mergeopd.loss.top_k import SupportScorer

Objective = Callable[[BlockStats, slice], Tensor]


@dataclass(frozen=True, eq=False)
class TokenStats(BlockStats):
    """Statistics of all N tokens, detached, and `loss [N]`, the objective's value per token."""

    loss: Tensor


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
) -> tuple[Tensor, TokenStats]:
    """Sum over tokens of an objective on exact full-vocabulary statistics (DeepSeek-V4, 2606.19348 5.1.2).

    On a `support`, divergences alone are reduced to it; log-probabilities and entropies stay exact.

    hidden_ND    student's last hidden states `[N, d_S]`; float64 computes in float64, others in float32
    targets      K teachers, constants, may be none: `Hidden` (hidden states `[N, d_T]` and a head), `TopK`
                 (its own k best, for a support that the teacher chooses) or `Sampled` (no divergences)
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
        scorer = _scorer(softmaxes, targets, divergences, support, all_ids)
        run = _Run(
            hidden_ND, head, labels_N, per_token, softmaxes, scorer, len(targets), divergences, gradients
        )
        for rows in slices(0, hidden_ND.shape[0], chunk_rows):
            run.chunk(rows)
        loss = run.stats.loss.sum()
    return gradients.attach(loss), run.stats


class _Run:
    """One call: the gradients and statistics that its chunks fill."""

    def __init__(
        self,
        hidden_ND: Tensor,
        head: Head,
        labels_N: Tensor,
        per_token: Objective,
        softmaxes: Softmaxes,
        scorer: Scorer,
        num_targets: int,
        divergences: Sequence[Divergence],
        gradients: HeadGradients,
    ) -> None:
        dtype = compute_dtype(hidden_ND)
        self._labels_N, self._per_token, self._divergences = labels_N, per_token, divergences
        self._vocab, self._student, self._teachers = head.vocab, softmaxes.student, softmaxes.teachers
        self._scorer = scorer
        # Collectives and kernel launches cost per block: with either, the block is the whole chunk.
        in_cache = softmaxes.group is None and hidden_ND.device.type == "cpu"
        self._block_rows = rows_in_cache(len(self._vocab), dtype) if in_cache else None
        num, num_T, num_D = hidden_ND.shape[0], num_targets, len(divergences)

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=hidden_ND.device)

        self.stats = TokenStats(
            divergence=empty(num_T, num_D, num),
            logprob_S=empty(num),
            logprob_T=empty(num_T, num),
            entropy_S=empty(num),
            entropy_T=empty(num_T, num),
            loss=empty(num),
        )
        self._gradients = gradients
        self._gradient_sum = empty().zero_()

    def chunk(self, rows: slice) -> None:
        logits_S = self._student.raw_logits(rows)
        logits_T = [teacher.raw_logits(rows) for teacher in self._teachers]
        for block in slices(0, logits_S.shape[0], self._block_rows or logits_S.shape[0]):
            tokens = slice(rows.start + block.start, rows.start + block.stop)
            self._block(logits_S[block], [logits[block] for logits in logits_T], tokens)
        self._check_finite(rows)
        self._gradients.add(self._student, logits_S, rows)

    def _block(self, logits_S: Tensor, logits_T: Sequence[Tensor], rows: slice) -> None:
        """Compute statistics and objective, and overwrite the student's logits with the logit gradient."""
        scored = self._scorer.score(logits_S, logits_T, self._labels_N, rows, with_grad=self._gradients.any)
        block, stats = scored.stats, self.stats
        for name in ("divergence", "logprob_S", "logprob_T", "entropy_S", "entropy_T"):
            getattr(stats, name)[..., rows] = getattr(block, name)
        loss, gradients = self._objective(block, rows)
        stats.loss[rows] = loss
        if gradients is not None:
            scored.logit_gradient(*gradients, out=logits_S)

    def _objective(self, stats: BlockStats, rows: slice) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        num = rows.stop - rows.start
        if not self._gradients.any:
            return _checked(self._per_token(stats, rows), num), None
        leaves = (stats.divergence.requires_grad_(), stats.logprob_S.requires_grad_())
        with torch.enable_grad():
            loss = _checked(self._per_token(stats, rows), num)
            if not loss.requires_grad:  # a constant: no gradient from these tokens
                return loss, (torch.zeros_like(leaves[0]), torch.zeros_like(leaves[1]))
            total = loss.sum()
        gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        for gradient in gradients:
            self._gradient_sum += gradient.sum()
        return loss.detach(), (gradients[0], gradients[1])

    def _check_finite(self, rows: slice) -> None:
        """Raise ArithmeticError naming whose numbers are not finite. Reduced scalars: all ranks agree."""
        stats = self.stats
        require_finite(stats.logprob_S[rows] + stats.entropy_S[rows], rows, "the student's logits")
        for k, (logprob, entropy) in enumerate(zip(stats.logprob_T, stats.entropy_T, strict=True)):
            require_finite(logprob[rows] + entropy[rows], rows, f"the logits of target {k}")
            for d, divergence in enumerate(self._divergences):
                require_finite(stats.divergence[k, d, rows], rows, f"{divergence} from target {k}")
        require_finite(stats.loss[rows], rows, "the objective's value (its statistics are finite)")
        if not torch.isfinite(self._gradient_sum):
            raise ArithmeticError(
                f"the objective's derivative is not finite in the tokens {rows.start} to {rows.stop - 1}, "
                "though its value is; look for torch.where around an infinite branch"
            )


def _project(
    hidden_ND: Tensor,
    head: Head,
    targets: Sequence[Target],
    temperature: float,
    workspace: Workspace | None,
) -> list[Projection]:
    dtype = compute_dtype(hidden_ND)
    workspace = Workspace() if workspace is None else workspace
    sides = [("student", head, hidden_ND)]
    sides += [
        (f"teacher{k}", target.head, target.hidden)
        for k, target in enumerate(targets)
        if isinstance(target, Hidden)
    ]
    return [Projection(*side, temperature, dtype, workspace) for side in sides]


def _scorer(
    softmaxes: Softmaxes,
    targets: Sequence[Target],
    divergences: Sequence[Divergence],
    support: Support | None,
    all_ids: range,
) -> Scorer:
    is_exact = all(isinstance(target, Hidden) for target in targets)
    if is_exact and (support is None or not divergences or not targets):
        return BlockScorer(softmaxes, divergences)
    return SupportScorer(softmaxes, targets, divergences, support, all_ids)


def _checked(loss: Tensor, num: int) -> Tensor:
    if loss.shape != (num,):
        raise ValueError(
            f"per_token must return one loss per token, [{num}], but returned {list(loss.shape)}"
        )
    return loss
