"""Scorer of X-Token's P-KL: the student's distribution projected to the teacher's vocabulary."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mergeopd.loss.buffers import Workspace
from mergeopd.loss.cross_tokenizer.maps import SparseMap
from mergeopd.loss.cross_tokenizer.rows import Block, Scored, Side
from mergeopd.loss.heads import Projection
from mergeopd.loss.support import top_columns

Direction = Literal["forward", "reverse"]


class ProjectionScorer:
    """Generalised KL between mean log-probabilities over the covered teacher ids, or each group's k best."""

    def __init__(
        self,
        student: Projection,
        teacher: Projection,
        workspace: Workspace,
        table: SparseMap,
        direction: Direction,
        top_k: int | None,
    ) -> None:
        self._student, self._teacher, self._workspace = student, teacher, workspace
        self._table, self._direction = table, direction
        self._is_complete = table.covered.shape[0] == table.vocab_T
        # All covered ids are no restriction and need no search.
        self._top_k = top_k if top_k is not None and top_k < table.covered.shape[0] else None

    def score(self, block: Block) -> Scored:
        with_grad = block.weight_g is not None
        s = Side.begin(self._student, block.raw_S, block.labels_S, block.num_S, with_slope=with_grad)
        t = Side.begin(self._teacher, block.raw_T, block.labels_T, block.num_T)
        log_T, ids = self._teacher_means(t)
        p_S = s.mass.mul_(s.log_mass.neg().exp_().unsqueeze(1))
        projected = self._project(p_S, None if ids is None else ids[s.group])
        # Underflowing probabilities get this logarithm, without a gradient.
        least = torch.finfo(projected.dtype).tiny
        is_lost = projected < least
        projected.clamp_(min=least)
        log_S = _means(projected.log(), s)
        q_S, q_T, log_ratio = log_S.exp(), log_T.exp(), log_S - log_T
        matched_S, matched_T = q_S.sum(1), q_T.sum(1)
        if self._direction == "forward":
            value = matched_S - matched_T - torch.linalg.vecdot(q_T, log_ratio)
            push = q_S.sub_(q_T)
        else:
            push = q_S.mul_(log_ratio)
            value = push.sum(1) - matched_S + matched_T
        if block.weight_g is not None:
            push.mul_((block.weight_g / block.num_S).to(push.dtype).unsqueeze(1))
            d_projected = (push if s.is_single else push[s.group]).div(projected).masked_fill_(is_lost, 0.0)
            self._gradient(s, p_S, d_projected, None if ids is None else ids[s.group], block.raw_S)
        return Scored(value, s.group_logprob(), t.group_logprob(), matched_S, matched_T)

    def _teacher_means(self, t: Side) -> tuple[Tensor, Tensor | None]:
        """Mean log-probabilities `[g, c]` and, if restricted, the indices `[g, k]` among the covered ids."""
        log_T = _means(t.logits.sub_(t.log_mass.unsqueeze(1)), t)
        if not self._is_complete:
            log_T = log_T.index_select(1, self._table.covered)
        if self._top_k is None:
            return log_T, None
        ids = top_columns(log_T, self._top_k)
        return log_T.gather(1, ids), ids

    def _project(self, p_S: Tensor, ids_nk: Tensor | None) -> Tensor:
        """`p_S W [n, c]` on the covered teacher ids, or those at `ids_nk` alone."""
        product = self._table.by_T.times(self._turned("p", p_S))
        if ids_nk is not None:
            return product.gather(0, ids_nk.t()).t().contiguous()
        return product.t().contiguous()

    def _gradient(self, s: Side, p_S: Tensor, d_projected: Tensor, ids_nk: Tensor | None, dz: Tensor) -> None:
        """`dz = p_S (g - <p_S, g>)` with `g = W dL/d(p_S W)`, over the raw logits."""
        if ids_nk is None:
            turned = self._turned("d", d_projected)
        else:
            shape = (self._table.covered.shape[0], d_projected.shape[0])
            turned = self._workspace.take("bridge.turned.d", shape, dz.dtype, dz.device).zero_()
            turned.scatter_(0, ids_nk.t(), d_projected.t())
        g = self._table.by_S.times(turned).t()
        torch.mul(p_S, g, out=dz)
        dz.sub_(p_S.mul_(dz.sum(1, keepdim=True)))
        s.finish_gradient(dz)

    def _turned(self, name: str, matrix: Tensor) -> Tensor:
        """Copy the transpose: a sparse product reads whole rows of it."""
        shape = (matrix.shape[1], matrix.shape[0])
        out = self._workspace.take(f"bridge.turned.{name}", shape, matrix.dtype, matrix.device)
        return out.copy_(matrix.t())


def _means(rows_nc: Tensor, side: Side) -> Tensor:
    """Means over each group's rows, `[g, c]`; the same memory where every group is one row."""
    if side.is_single:
        return rows_nc
    sums = rows_nc.new_zeros(side.num.shape[0], rows_nc.shape[1]).index_add_(0, side.group, rows_nc)
    return sums.div_(side.num.unsqueeze(1))
