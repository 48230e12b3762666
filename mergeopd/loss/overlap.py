"""Overlap of the likeliest tokens of a student and its teachers (2604.13016), on chosen tokens of a pass.

At every position, O are the tokens among the k most probable ones of both models. The *ratio* is |O| / k, the
*mass* each model's probability on O, and the *advantage* the mean over O of
`pbar_S (log pbar_T - log pbar_S)`, where both are renormalised on O; it is not defined where O is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mergeopd.loss.heads import Hidden
from mergeopd.loss.slicing import rows_in_cache, rows_in_chunk
from mergeopd.loss.softmax import Softmaxes
from mergeopd.loss.support import top_ids
from mergeopd.loss.targets import Target, TopK

OVERLAP_K = 16
"""The k of 2604.13016."""
# Where launches and collectives cost more than memory, the rows that are measured together.
_PART_OF_CHUNK = 16


@dataclass(frozen=True, eq=False)
class Overlap:
    """Overlap of K teachers with the student at M of a pass's tokens, detached; see the module.

    `rows [M]` are the tokens, on the CPU; `ratio`, `advantage`, `mass_S` and `mass_T` are `[K, M]`. The
    advantage is NaN where no token is common. All are NaN for a target that does not contain the teacher's k
    most probable tokens.
    """

    rows: Tensor
    ratio: Tensor
    advantage: Tensor
    mass_S: Tensor
    mass_T: Tensor


@dataclass(eq=False)
class OverlapMeter:
    """Fills an `Overlap` from raw logits, which it copies: it changes nothing that the loss is made of.

    Rows of several chunks are collected, since with a small vocabulary the calls cost more than the work.
    """

    softmaxes: Softmaxes
    targets: Sequence[Target]
    k: int
    all_ids: range
    overlap: Overlap
    _buffers: Sequence[Tensor] = ()
    _start: int = 0  # among the chosen tokens, the first in the buffers, and the first after them
    _stop: int = 0

    @classmethod
    def of(
        cls, softmaxes: Softmaxes, targets: Sequence[Target], rows: Tensor, k: int, like: Tensor, ids: range
    ) -> OverlapMeter:
        """Prepare to measure the tokens `rows` (ascending), in the dtype and on the device of `like`.

        `ids` is the whole vocabulary, to whose size k is capped.
        """
        empty = [like.new_full((len(targets), len(rows)), torch.nan) for _ in range(4)]
        size = rows_in_cache(len(softmaxes.vocab), like.dtype)
        if softmaxes.group is not None or like.device.type != "cpu":
            size = rows_in_chunk(like.device, len(softmaxes.vocab), like.dtype) // _PART_OF_CHUNK
        size = min(size, len(rows))
        models = (softmaxes.student, *softmaxes.teachers)
        buffers = [model.take("overlap", size) for model in models]
        return cls(softmaxes, targets, min(k, len(ids)), ids, Overlap(rows, *empty), buffers)

    def add(self, logits_S: Tensor, logits_T: Sequence[Tensor], chunk: slice) -> None:
        """Take the chosen tokens of a chunk from its raw logits `[n, V]`."""
        stop = int(torch.searchsorted(self.overlap.rows, chunk.stop))
        while self._stop < stop:
            num = min(stop - self._stop, len(self._buffers[0]) - (self._stop - self._start))
            own = (
                self.overlap.rows[self._stop : self._stop + num].to(logits_S.device, non_blocking=True)
                - chunk.start
            )
            place = slice(self._stop - self._start, self._stop - self._start + num)
            for buffer, raw in zip(self._buffers, (logits_S, *logits_T), strict=True):
                torch.index_select(raw, 0, own, out=buffer[place])
            self._stop += num
            if place.stop == len(self._buffers[0]):
                self.measure()

    def measure(self) -> None:
        """Measure the tokens that were taken and not yet measured. Performs four collectives."""
        if self._start == self._stop:
            return
        models = (self.softmaxes.student, *self.softmaxes.teachers)
        part = slice(self._start, self._stop)
        logits = [buffer[: self._stop - self._start] for buffer in self._buffers]
        for model, matrix in zip(models, logits, strict=True):
            model.finish_logits(matrix)
        self._measure(logits, self.overlap.rows[part].to(logits[0].device, non_blocking=True), part)
        self._start = self._stop

    def _measure(self, logits: Sequence[Tensor], rows: Tensor, part: slice) -> None:
        """Measure the tokens `rows` from finished logits; `part` is their place in the result."""
        group, vocab = self.softmaxes.group, self.softmaxes.vocab
        log_mass = _over_shards(torch.stack([matrix.logsumexp(1) for matrix in logits]), group)
        if self.k == len(self.all_ids):
            everything = torch.tensor(self.all_ids, device=rows.device).expand(len(rows), -1)
            ids = [everything] * len(logits)
        else:
            ids = top_ids(logits, self.k, vocab, group)
        log_models = torch.stack([_take(matrix, ids[0], vocab) for matrix in logits])
        if group is not None:
            dist.all_reduce(log_models, dist.ReduceOp.SUM, group=group)
        log_models -= log_mass.unsqueeze(2)
        place = iter(range(1, len(logits)))
        for index, target in enumerate(self.targets):
            if isinstance(target, Hidden):
                model = next(place)
                is_common = (ids[0].unsqueeze(2) == ids[model].unsqueeze(1)).any(2)
                self._fill(index, part, log_models[0], log_models[model], is_common)
            elif isinstance(target, TopK) and target.of == "teacher" and target.k >= self.k:
                log_T, is_common = _known(target, rows, self.k, ids[0])
                self._fill(index, part, log_models[0], log_T.to(log_models), is_common)

    def _fill(self, index: int, part: slice, log_S: Tensor, log_T: Tensor, is_common: Tensor) -> None:
        """Compute one teacher's numbers from log-probabilities `[m, k]` of the student's k ids."""
        own = self.overlap
        kept = (own.ratio, own.advantage, own.mass_S, own.mass_T)
        for values, new in zip(kept, on_common(log_S, log_T, is_common), strict=True):
            values[index, part] = new


def on_common(log_S: Tensor, log_T: Tensor, is_common: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ratio, advantage, and the masses of student and teacher, `[m]` each; see the module.

    `log_S` and `log_T` are both models' log-probabilities of the student's k likeliest ids, `[m, k]`;
    `is_common` are those of them that are also among the teacher's.
    """
    num = is_common.sum(1)
    mass_S = log_S.masked_fill(~is_common, -torch.inf).logsumexp(1)
    mass_T = log_T.masked_fill(~is_common, -torch.inf).logsumexp(1)
    excess = (log_T - mass_T.unsqueeze(1)) - (log_S - mass_S.unsqueeze(1))
    terms = torch.where(is_common, (log_S - mass_S.unsqueeze(1)).exp() * excess, 0.0)
    advantage = torch.where(num > 0, terms.sum(1) / num, torch.nan)
    return num.to(log_S) / is_common.shape[1], advantage, mass_S.exp(), mass_T.exp()


def _over_shards(log_mass: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the logarithm of the sum over all shards, of logarithms of a shard's sums."""
    if group is None:
        return log_mass
    parts = [torch.empty_like(log_mass) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, log_mass, group=group)
    return torch.stack(parts).logsumexp(0)


def _take(matrix_nV: Tensor, ids_nk: Tensor, vocab: range) -> Tensor:
    """Return the entries of these ids; 0 for those of other shards."""
    if not len(vocab):
        return matrix_nV.new_zeros(ids_nk.shape)
    columns = ids_nk - vocab.start
    is_here = (columns >= 0) & (columns < len(vocab))
    return torch.where(is_here, matrix_nV.gather(1, columns.clamp(0, len(vocab) - 1)), 0.0)


def _known(target: TopK, rows: Tensor, k: int, ids_S: Tensor) -> tuple[Tensor, Tensor]:
    """Return a teacher's log-probabilities of the student's ids, and which are among its own k ids."""
    best = target.logprobs[rows].topk(k, dim=1)
    ids_T = target.ids[rows].gather(1, best.indices)
    is_same = ids_S.unsqueeze(2) == ids_T.unsqueeze(1)
    return best.values.gather(1, is_same.int().argmax(2)), is_same.any(2)
