"""Scorer of X-Token's P-KL: the student's distribution projected to the teacher's vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergeopd.loss.buffers import Workspace
from mergeopd.loss.cross_tokenizer.maps import SparseMap
from mergeopd.loss.cross_tokenizer.rows import Block, Scored, Side
from mergeopd.loss.support import top_columns

Direction = Literal["forward", "reverse"]


@dataclass(frozen=True, eq=False)
class ProjectionScorer:
    """Generalised KL between mean log-probabilities over the covered teacher ids, or each group's k best."""

    workspace: Workspace
    table: SparseMap
    direction: Direction
    top_k: int | None

    def score(self, block: Block) -> Scored:
        s = block.s
        log_T, ids = self._teacher_means(block.t)
        p_S = s.mass.mul_(s.log_mass.neg().exp_().unsqueeze(1))
        ids_nk = None if ids is None else ids[s.group]
        projected = self._project(p_S, ids_nk)
        # Underflowing probabilities get this logarithm, without a gradient.
        least = torch.finfo(projected.dtype).tiny
        is_lost = projected < least
        projected.clamp_(min=least)
        log_S = _means(projected.log(), s)
        q_S, q_T, log_ratio = log_S.exp(), log_T.exp(), log_S - log_T
        matched_S, matched_T = q_S.sum(1), q_T.sum(1)
        if self.direction == "forward":
            value = matched_S - matched_T - torch.linalg.vecdot(q_T, log_ratio)
            push = q_S.sub_(q_T)
        else:
            push = q_S.mul_(log_ratio)
            value = push.sum(1) - matched_S + matched_T
        if block.weight_g is not None:
            push.mul_((block.weight_g / s.num).to(push.dtype).unsqueeze(1))
            d_projected = (push if s.is_single else push[s.group]).div(projected).masked_fill_(is_lost, 0.0)
            self._gradient(s, p_S, d_projected, ids_nk)
        return Scored(value, matched_S, matched_T)

    def _teacher_means(self, t: Side) -> tuple[Tensor, Tensor | None]:
        """Mean log-probabilities `[g, c]` and, if restricted, the indices `[g, k]` among the covered ids."""
        log_T = _means(t.logits.sub_(t.log_mass.unsqueeze(1)), t)
        num_covered = self.table.covered.shape[0]
        if num_covered < self.table.vocab_T:
            log_T = log_T.index_select(1, self.table.covered)
        if self.top_k is None or self.top_k >= num_covered:  # no restriction, which needs no search
            return log_T, None
        ids = top_columns(log_T, self.top_k)
        return log_T.gather(1, ids), ids

    def _project(self, p_S: Tensor, ids_nk: Tensor | None) -> Tensor:
        """`p_S W [n, c]` on the covered teacher ids, or those at `ids_nk` alone."""
        product = self.table.by_T.times(self._turned("p", p_S))
        if ids_nk is not None:
            return product.gather(0, ids_nk.t()).t().contiguous()
        return product.t().contiguous()

    def _gradient(self, s: Side, p_S: Tensor, d_projected: Tensor, ids_nk: Tensor | None) -> None:
        """`dz = p_S (g - <p_S, g>)` with `g = W dL/d(p_S W)`, over the logits."""
        if ids_nk is None:
            turned = self._turned("d", d_projected)
        else:
            shape = (self.table.covered.shape[0], d_projected.shape[0])
            turned = self.workspace.take("bridge.turned.d", shape, p_S.dtype, p_S.device).zero_()
            turned.scatter_(0, ids_nk.t(), d_projected.t())
        dz = torch.mul(p_S, self.table.by_S.times(turned).t(), out=s.logits)
        dz.sub_(p_S.mul_(dz.sum(1, keepdim=True)))

    def _turned(self, name: str, matrix: Tensor) -> Tensor:
        """Copy the transpose: a sparse product reads whole rows of it."""
        shape = (matrix.shape[1], matrix.shape[0])
        out = self.workspace.take(f"bridge.turned.{name}", shape, matrix.dtype, matrix.device)
        return out.copy_(matrix.t())


def _means(rows_nc: Tensor, side: Side) -> Tensor:
    """Means over each group's rows, `[g, c]`; the same memory where every group is one row."""
    if side.is_single:
        return rows_nc
    sums = rows_nc.new_zeros(side.num.shape[0], rows_nc.shape[1]).index_add_(0, side.group, rows_nc)
    return sums.div_(side.num.unsqueeze(1))
