"""The one kernel: hidden states in, loss and its gradients out, never a `[N, V]` matrix.

A chunk of tokens goes through four matrix products (student logits, teacher logits, dH, dW; one more for
each further teacher); between them, blocks of a few rows stay in the processor's cache while statistics,
objective and closed-form logit gradient are computed. Nothing is recomputed in backward: the gradients are
ready when the forward returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mergeopd.loss.blocks import BlockScorer, BlockStats
from mergeopd.loss.divergence import Divergence
from mergeopd.loss.heads import Head, Hidden, Projection
from mergeopd.loss.workspace import Workspace

Objective = Callable[[BlockStats, slice], Tensor]

# About four such matrices are alive at a time; together they should stay in the last-level cache, while
# each block should be long enough to hide the cost of some fifty small torch calls.
_BLOCK_BYTES = 2 << 20
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class TokenStats(BlockStats):
    """Statistics of all N tokens, detached, and `loss [N]`, the objective's value per token."""

    loss: Tensor


def fused_loss(
    hidden_ND: Tensor,
    head: Head,
    targets: Sequence[Hidden],
    labels_N: Tensor,
    per_token: Objective,
    *,
    divergences: Sequence[Divergence],
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int = 256,
    workspace: Workspace | None = None,
) -> tuple[Tensor, TokenStats]:
    """Sum over tokens of an objective on exact full-vocabulary statistics (DeepSeek-V4, 2606.19348 5.1.2).

    hidden_ND    student's last hidden states `[N, d_S]`; float64 computes in float64, others in float32
    targets      K teachers' hidden states `[N, d_T]` and heads; constants, may be none
    labels_N     sampled token ids, int64
    per_token    `(stats, rows) -> [n]`: the loss of the tokens `rows`, already weighted and divided by its
                 global denominator. Called block by block with `divergence` and `logprob_S` requiring grad;
                 constants that it needs are sliced with `rows`. Under a group every rank calls it alike
    divergences  what to measure between the student and each teacher
    temperature  divides both sides' logits in all statistics; a factor tau^2 is the objective's business
    group        ranks that share the vocabulary: heads are shards, all else is replicated. dH comes back
                 *partial* (sum it over the group), dW belongs to the shard
    chunk_rows   tokens per matrix product; memory is about `chunk_rows * V * (1 + K)` elements
    workspace    buffers to reuse over calls

    Returns the loss, a scalar whose backward hands out gradients for `hidden_ND`, `head.weight` and
    `head.bias` (once differentiable; none are computed where nothing requires grad), and the statistics.

    Raises ValueError for shapes, vocabularies or labels that do not fit, ArithmeticError for NaN or inf in
    the student's or a named target's statistics, or from the objective. Under a group all ranks raise.
    """
    problem = _vocab_problem(head, targets)
    _check_inputs(hidden_ND, head, targets, labels_N, temperature, chunk_rows)
    _check_labels(labels_N, head.vocab, problem, group)
    wanted = (hidden_ND, head.weight, head.bias)
    needs = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in wanted]
    with torch.no_grad():
        run = _Run(
            hidden_ND, head, targets, labels_N, per_token, divergences, temperature, group, workspace, needs
        )
        for rows in _slices(0, hidden_ND.shape[0], chunk_rows):
            run.chunk(rows)
        loss = run.stats.loss.sum()
        gradients = run.gradients()
    if any(needs):
        loss = _Attach.apply(loss, *wanted, *gradients)  # type: ignore[no-untyped-call]
    return loss, run.stats


class _Run:
    """One call: the gradients and statistics that its chunks fill."""

    def __init__(
        self,
        hidden_ND: Tensor,
        head: Head,
        targets: Sequence[Hidden],
        labels_N: Tensor,
        per_token: Objective,
        divergences: Sequence[Divergence],
        temperature: float,
        group: dist.ProcessGroup | None,
        workspace: Workspace | None,
        needs: Sequence[bool],
    ) -> None:
        dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        workspace = Workspace() if workspace is None else workspace
        self._labels_N, self._per_token, self._divergences = labels_N, per_token, divergences
        self._vocab = head.vocab
        self._student = Projection("student", head, hidden_ND, temperature, dtype, workspace)
        self._teachers = [
            Projection(f"teacher{k}", target.head, target.hidden, temperature, dtype, workspace)
            for k, target in enumerate(targets)
        ]
        self._scorer = BlockScorer(self._student, self._teachers, divergences, self._vocab, group)
        # Collectives and kernel launches cost per block: with either, the block is the whole chunk.
        in_cache = group is None and hidden_ND.device.type == "cpu"
        row_bytes = max(len(self._vocab), 1) * dtype.itemsize
        self._block_rows = max(_BLOCK_BYTES // row_bytes, 1) if in_cache else None
        num, num_T, num_D = hidden_ND.shape[0], len(targets), len(divergences)

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
        self._dtypes = [
            tensor.dtype
            for tensor in (hidden_ND, head.weight, head.weight if head.bias is None else head.bias)
        ]
        self._dH = torch.empty_like(hidden_ND, requires_grad=False) if needs[0] else None
        self._dW = empty(*head.weight.shape) if needs[1] else None
        self._dbias = empty(head.weight.shape[0]).zero_() if needs[2] else None
        self._gradient_sum = empty().zero_()
        self._is_first = True
        if self._dW is not None:
            self._dW[len(self._vocab) if num else 0 :].zero_()

    @property
    def _needs_grad(self) -> bool:
        return any(gradient is not None for gradient in (self._dH, self._dW, self._dbias))

    def chunk(self, rows: slice) -> None:
        """All products and blocks of the tokens `rows`."""
        logits_S = self._student.raw_logits(rows)
        logits_T = [teacher.raw_logits(rows) for teacher in self._teachers]
        for block in _slices(0, logits_S.shape[0], self._block_rows or logits_S.shape[0]):
            tokens = slice(rows.start + block.start, rows.start + block.stop)
            self._block(logits_S[block], [logits[block] for logits in logits_T], tokens)
        self._check_finite(rows)
        if self._dH is not None:
            self._student.grad_hidden(logits_S, self._dH[rows])
        if self._dW is not None:
            valid = self._dW[: len(self._vocab)]
            self._student.grad_weight(logits_S, rows, valid, accumulate=not self._is_first)
        if self._dbias is not None:
            self._dbias[: len(self._vocab)].add_(logits_S.sum(0))
        self._is_first = False

    def _block(self, logits_S: Tensor, logits_T: Sequence[Tensor], rows: slice) -> None:
        """Statistics, objective, and the logit gradient in place of the student's logits."""
        scored = self._scorer.score(logits_S, logits_T, self._labels_N[rows], with_grad=self._needs_grad)
        block, stats = scored.stats, self.stats
        for name in ("divergence", "logprob_S", "logprob_T", "entropy_S", "entropy_T"):
            getattr(stats, name)[..., rows] = getattr(block, name)
        loss, gradients = self._objective(block, rows)
        stats.loss[rows] = loss
        if gradients is not None:
            self._scorer.logit_gradient(scored, *gradients, out=logits_S)

    def _objective(self, stats: BlockStats, rows: slice) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        num = rows.stop - rows.start
        if not self._needs_grad:
            return _checked(self._per_token(stats, rows), num), None
        leaves = (stats.divergence.requires_grad_(), stats.logprob_S.requires_grad_())
        with torch.enable_grad():
            loss = _checked(self._per_token(stats, rows), num)
            if not loss.requires_grad:  # a constant: nothing to learn from these tokens
                return loss, (torch.zeros_like(leaves[0]), torch.zeros_like(leaves[1]))
            total = loss.sum()
        gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        for gradient in gradients:
            self._gradient_sum += gradient.sum()
        return loss.detach(), (gradients[0], gradients[1])

    def _check_finite(self, rows: slice) -> None:
        """Raise ArithmeticError naming whose numbers are not finite. Reduced scalars: all ranks agree."""
        stats = self.stats
        _require_finite(stats.logprob_S[rows] + stats.entropy_S[rows], rows, "the student's logits")
        for k in range(len(self._teachers)):
            _require_finite(
                stats.logprob_T[k, rows] + stats.entropy_T[k, rows], rows, f"the logits of target {k}"
            )
            for d, divergence in enumerate(self._divergences):
                _require_finite(stats.divergence[k, d, rows], rows, f"{divergence} from target {k}")
        _require_finite(stats.loss[rows], rows, "the objective's value (its statistics are finite)")
        if not torch.isfinite(self._gradient_sum):
            raise ArithmeticError(
                f"the objective's derivative is not finite in the tokens {rows.start} to {rows.stop - 1}, "
                "though its value is; look for torch.where around an infinite branch"
            )

    def gradients(self) -> list[Tensor | None]:
        """dH, dW and dbias in their inputs' dtypes, None where not wanted."""
        found = (self._dH, self._dW, self._dbias)
        return [
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(found, self._dtypes, strict=True)
        ]


class _Attach(torch.autograd.Function):
    """Hangs gradients that are known already on the loss."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *inputs_and_gradients: Tensor | None) -> Tensor:
        """`inputs_and_gradients`: the three inputs, then the gradient of each."""
        ctx.save_for_backward(*inputs_and_gradients[3:])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients times `grad_loss`; for a plain `loss.backward()` they are handed over, not copied."""
        gradients = ctx.saved_tensors
        if grad_loss != 1.0:
            gradients = [None if gradient is None else gradient * grad_loss for gradient in gradients]
        return (None, *gradients, None, None, None)


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def _require_finite(values: Tensor, rows: slice, what: str) -> None:
    bad = torch.isfinite(values).logical_not_()
    if bad.any():
        token = rows.start + int(bad.nonzero()[0])
        raise ArithmeticError(
            f"{what}: not finite at {int(bad.sum())} of the tokens {rows.start} to {rows.stop - 1}, "
            f"first at {token}"
        )


def _checked(loss: Tensor, num: int) -> Tensor:
    if loss.shape != (num,):
        raise ValueError(
            f"per_token must return one loss per token, [{num}], but returned {list(loss.shape)}"
        )
    return loss


def _check_inputs(
    hidden_ND: Tensor,
    head: Head,
    targets: Sequence[Hidden],
    labels_N: Tensor,
    temperature: float,
    chunk_rows: int,
) -> None:
    if hidden_ND.dim() != 2:
        raise ValueError(
            f"hidden_ND must be [N, d], got {list(hidden_ND.shape)}; flatten batch and time first"
        )
    num = hidden_ND.shape[0]
    sides = [("the student", hidden_ND, head)]
    sides += [(f"target {k}", target.hidden, target.head) for k, target in enumerate(targets)]
    for name, hidden, side in sides:
        expected = (num, side.weight.shape[1])
        if hidden.shape != expected:
            raise ValueError(
                f"{name}: hidden states are {list(hidden.shape)}, its head needs {list(expected)}"
            )
        if hidden.dtype not in _DTYPES:
            raise ValueError(f"{name}: hidden states are {hidden.dtype}, must be float64, 32, 16 or bfloat16")
    if labels_N.shape != (num,) or labels_N.dtype != torch.int64:
        raise ValueError(f"labels_N must be int64 [{num}], got {labels_N.dtype} {list(labels_N.shape)}")
    if not temperature > 0.0:
        raise ValueError(f"temperature is {temperature}, must be positive")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}, must be at least 1")


def _vocab_problem(head: Head, targets: Sequence[Hidden]) -> str | None:
    for k, target in enumerate(targets):
        if target.head.vocab != head.vocab:
            return (
                f"target {k} scores token ids [{target.head.vocab.start}, {target.head.vocab.stop}), "
                f"the student [{head.vocab.start}, {head.vocab.stop}); "
                "give each head its num_valid and vocab_start"
            )
    return None


def _check_labels(
    labels_N: Tensor, vocab: range, problem: str | None, group: dist.ProcessGroup | None
) -> None:
    """Every sampled id must be a true token of exactly one shard. One small all-reduce; all ranks raise."""
    is_local = (labels_N >= vocab.start) & (labels_N < vocab.stop)
    owners = torch.cat([is_local.long(), is_local.new_tensor([problem is not None]).long()])
    if group is not None:
        dist.all_reduce(owners, dist.ReduceOp.SUM, group=group)
    if owners[-1]:
        raise ValueError(problem or "on another rank of the group, student and target shards do not match")
    if torch.any(owners[:-1] != 1):
        token = int((owners[:-1] != 1).nonzero()[0])
        where = f"the true vocabulary [{vocab.start}, {vocab.stop})" if group is None else "exactly one shard"
        raise ValueError(
            f"labels_N[{token}] = {int(labels_N[token])} is not in {where}; "
            "leave out padding and prompt tokens"
        )
