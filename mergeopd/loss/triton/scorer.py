"""Statistics of a chunk and its logit gradient by Triton: what `full_vocabulary.py` does with torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mergeopd.loss.divergence import JSD, Divergence, ForwardKL, ReverseKL, largest_log
from mergeopd.loss.full_vocabulary import BlockStats
from mergeopd.loss.pointwise import TVD, AlphaDivergence, ClippedForwardKL, SkewForwardKL, SkewReverseKL
from mergeopd.loss.softmax import Softmaxes, entropy_and_logprob
from mergeopd.loss.triton import kernels

# Rows and columns of a program's block, and its warps. One row at a time keeps a GPU's memory busy; the
# interpreter runs a program in Python, so there a program takes many rows.
_ON_DEVICE = (1, 1024, 8)
_INTERPRETED = (32, 128, 1)
# Programs that share a row, so that a chunk of a few hundred rows fills the device.
_PARTS = 8


def code_of(divergence: Divergence) -> tuple[int, float]:
    """Return a divergence's code in the kernels and its parameter."""
    match divergence:
        case ForwardKL():
            return kernels.FORWARD_KL.value, 0.0
        case ReverseKL():
            return kernels.REVERSE_KL.value, 0.0
        case JSD(beta):
            return kernels.JSD.value, beta
        case TVD():
            return kernels.TVD.value, 0.0
        case SkewForwardKL(alpha):
            return kernels.SKEW_FORWARD_KL.value, alpha
        case SkewReverseKL(alpha):
            return kernels.SKEW_REVERSE_KL.value, alpha
        case ClippedForwardKL(bound):
            return kernels.CLIPPED_FORWARD_KL.value, bound
        case AlphaDivergence(alpha):
            return kernels.ALPHA.value, alpha
    raise ValueError(f"the Triton kernel does not compute {divergence}; use kernel='torch'")


@dataclass(frozen=True, eq=False)
class Chunk:
    """A chunk's raw logits `[models, n, V]` and what the kernels need to know about them.

    columns `[n]`: the sampled token's column, -1 where it is another shard's.
    """

    logits: Tensor
    bias: Tensor  # [models, V], or without columns
    factors: Tensor  # [models, 2]: before and after the cap
    columns: Tensor
    options: dict[str, Any]  # constants of all kernels

    @property
    def num_teachers(self) -> int:
        return self.logits.shape[0] - 1

    @property
    def width(self) -> int:
        """Columns of a program: whole blocks."""
        block: int = self.options["BLOCK"]
        return -(-self.logits.shape[2] // (block * _PARTS)) * block

    @property
    def num_parts(self) -> int:
        return -(-self.logits.shape[2] // self.width) if self.logits.shape[2] else 0

    @property
    def grid(self) -> tuple[int, int]:
        """Programs for all rows and parts of the columns."""
        return -(-self.logits.shape[1] // self.options["ROWS"]), self.num_parts

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.logits.shape[1], self.logits.shape[2], self.logits.stride(0), self.width

    def launch_statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums of each part of the columns; see the kernel."""
        num_models, num, _ = self.logits.shape
        moments = self.logits.new_empty(self.num_parts, num_models, 3, num)
        pairs = self.logits.new_empty(self.num_parts, self.num_teachers, 2, num)
        sampled = self.logits.new_zeros(num_models, num)
        if moments.numel():
            kernels.statistics_kernel[(max(self.num_teachers, 1), *self.grid)](
                self.logits, self.bias, self.factors, self.columns, moments, pairs, sampled, *self.sizes,
                PAIRED=self.num_teachers > 0, **self.options,
            )  # fmt: skip
        return moments, pairs, sampled

    def launch_terms(self, softmax: tuple[Tensor, Tensor, Tensor], divergence: Divergence) -> Tensor:
        """Return a divergence and the sum of its direction, over this shard, `[K, 2, n]`."""
        terms = self.logits.new_empty(self.num_parts, self.num_teachers, 2, self.logits.shape[1])
        if terms.numel():
            kernels.terms_kernel[(self.num_teachers, *self.grid)](
                self.logits, self.bias, self.factors, *softmax, terms, *self.sizes,
                *code_of(divergence), largest_log(self.logits.dtype), **self.options,
            )  # fmt: skip
        return terms.sum(0)


@dataclass(frozen=True, eq=False)
class TritonScored:
    """A chunk between its statistics and its gradient."""

    stats: BlockStats
    chunk: Chunk
    softmax: tuple[Tensor, Tensor, Tensor]  # centres and per_mass [models, n], offsets [K, n]
    divergences: Sequence[Divergence]
    total: Tensor  # [K, D, n]: <p_S, g>
    gain: float

    @property
    def student_ranking(self) -> Tensor:
        """`[n, V]`, in each row in the order of the student's logits."""
        logits_S = self.chunk.logits[0]
        return logits_S + self.chunk.bias[0] if self.chunk.options["BIASED"] else logits_S

    def logit_gradient(self, grad_divergence: Tensor, grad_logprob: Tensor | None, out: Tensor) -> None:
        """Write d(loss)/d(raw student logits) `[n, V]` into `out`, of any floating-point dtype."""
        chunk = self.chunk
        if not chunk.num_parts:
            return
        at_label = (
            torch.zeros_like(self.stats.logprob_S) if grad_logprob is None else grad_logprob * self.gain
        )
        push = grad_divergence * self.gain
        pull = torch.linalg.vecdot(push.flatten(0, 1), self.total.flatten(0, 1), dim=0).add_(at_label)
        codes = tuple(zip(*map(code_of, self.divergences), strict=True)) or ((), ())
        kernels.gradient_kernel[chunk.grid](
            chunk.logits, chunk.bias, chunk.factors, *self.softmax, chunk.columns,
            push.contiguous(), pull, at_label, out,
            *chunk.sizes, chunk.num_teachers if self.divergences else 0, out.stride(0),
            *codes, largest_log(chunk.logits.dtype), **chunk.options,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class TritonScorer:
    """Scores chunks for one student, its teachers and any number of divergences on the whole vocabulary."""

    softmaxes: Softmaxes
    divergences: Sequence[Divergence]

    def score(self, raw: Tensor, rows: slice, *, with_grad: bool) -> TritonScored:
        """Score the tokens `rows` from raw logits `[models, n, V]`, unchanged. Performs all reductions."""
        softmaxes, logits = self.softmaxes, raw
        chunk = self._chunk(logits, rows)
        moments, pairs, sampled = chunk.launch_statistics()
        centres = _row_maxima(moments, logits)
        if softmaxes.group is not None:
            dist.all_reduce(centres, dist.ReduceOp.MAX, group=softmaxes.group)
        sums, crossed = _summed(moments, pairs, centres)
        label = torch.where(chunk.columns >= 0, sampled - centres, 0.0)
        num_models, num, _ = logits.shape
        sums = torch.cat([torch.cat([sums, label.unsqueeze(1)], 1).flatten(0, 1), crossed.flatten(0, 1)])
        sums = softmaxes.sum(sums)
        reduced = sums[: 3 * num_models].view(num_models, 3, num)
        log_mass, entropy, logprob = entropy_and_logprob(reduced)
        softmax = (centres, reduced[:, 0].reciprocal(), log_mass[:1] - log_mass[1:])
        crossed = sums[3 * num_models :].view(-1, 2, num)
        divergence, total = self._divergences(chunk, crossed, softmax)
        stats = BlockStats(divergence, logprob[0], logprob[1:], entropy[0], entropy[1:])
        return TritonScored(stats, chunk, softmax, self.divergences, total, softmaxes.student.gain)

    @cached_property
    def _columns(self) -> Tensor:
        """The sampled tokens' columns, -1 for those of other shards."""
        labels, vocab = self.softmaxes.labels_N, self.softmaxes.vocab
        return torch.where((labels >= vocab.start) & (labels < vocab.stop), labels - vocab.start, -1)

    def _chunk(self, logits: Tensor, rows_N: slice) -> Chunk:
        models = (self.softmaxes.student, *self.softmaxes.teachers)
        rows, block, warps = _ON_DEVICE if logits.is_cuda else _INTERPRETED
        options = {
            "BIASED": self._bias.shape[1] > 0,
            "CAPPED": any(model.is_capped for model in models),
            "ROWS": rows,
            "BLOCK": block,
            "num_warps": warps,
        }
        return Chunk(logits, self._bias, self._factors, self._columns[rows_N], options)

    @cached_property
    def _bias(self) -> Tensor:
        biases = [model.bias_V for model in (self.softmaxes.student, *self.softmaxes.teachers)]
        width = len(self.softmaxes.vocab) if any(bias is not None for bias in biases) else 0
        none = torch.zeros(width, dtype=self.softmaxes.student.dtype, device=self.softmaxes.student.device)
        return torch.stack([none if bias is None else bias for bias in biases])

    @cached_property
    def _factors(self) -> Tensor:
        student = self.softmaxes.student
        factors = [model.factors for model in (student, *self.softmaxes.teachers)]
        return torch.tensor(factors, dtype=student.dtype).to(student.device, non_blocking=True)

    def _divergences(
        self, chunk: Chunk, crossed: Tensor, softmax: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the divergences and `<p_S, g>`, `[K, D, n]` each.

        The two KLs are linear in the log-ratio, so their sums are known from the statistics; the others need
        normalised probabilities, hence another pass and reduction.
        """
        _, per_mass, offsets = softmax
        value, total = crossed.new_empty(2, chunk.num_teachers, len(self.divergences), crossed.shape[2])
        others = []
        for d, divergence in enumerate(self.divergences):
            match divergence:
                case ReverseKL():
                    value[:, d] = total[:, d] = crossed[:, 0] * per_mass[0] - offsets
                case ForwardKL():
                    value[:, d], total[:, d] = offsets - crossed[:, 1] * per_mass[1:], -1.0
                case _:
                    others.append(d)
        if others and chunk.num_teachers:
            terms = torch.stack([chunk.launch_terms(softmax, self.divergences[d]) for d in others], 1)
            terms = self.softmaxes.sum(terms)
            for place, d in enumerate(others):
                value[:, d], total[:, d] = terms[:, place, 0], terms[:, place, 1]
        return value, total


def _row_maxima(moments: Tensor, logits: Tensor) -> Tensor:
    """Return each model's largest logits over this shard's parts, `[models, n]`."""
    if not moments.shape[0]:  # a shard of padding only
        return logits.new_full(logits.shape[:2], -torch.inf)
    return moments[:, :, 0].amax(0)


def _summed(moments: Tensor, pairs: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the parts, from their own largest logits to common `centres`: `[models, 2, n]`, `[K, 2, n]`."""
    mass = moments[:, :, 1]
    shift = torch.where(mass == 0.0, 0.0, moments[:, :, 0] - centres)
    scale = shift.exp()
    moment = torch.addcmul(moments[:, :, 2], shift, mass)
    sums = torch.stack([mass * scale, moment * scale], 2).sum(0)
    between = (shift[:, :1] - shift[:, 1:]).unsqueeze(2)
    masses = torch.stack([mass[:, :1].expand_as(mass[:, 1:]), mass[:, 1:]], 2)
    scales = torch.stack([scale[:, :1].expand_as(mass[:, 1:]), scale[:, 1:]], 2)
    return sums, (torch.addcmul(pairs, between, masses) * scales).sum(0)
