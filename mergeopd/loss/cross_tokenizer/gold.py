"""Scorer of GOLD and ULD: shared tokens by identity, the others by rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mergeopd.loss.buffers import Workspace
from mergeopd.loss.cross_tokenizer.maps import ExactPairs
from mergeopd.loss.cross_tokenizer.rows import Block, MergeStrategy, Scored, Side
from mergeopd.loss.cross_tokenizer.sorted_l1 import sorted_l1
from mergeopd.loss.divergence import JSD, Pair


@dataclass(frozen=True, eq=False)
class RankScorer:
    """JSD on exact pairs (if any) and sorted L1 on all other ids, with `weights` in this order."""

    workspace: Workspace
    merge: MergeStrategy
    pairs: ExactPairs | None = None
    jsd: JSD | None = None
    weights: tuple[float, float] = (0.0, 1.0)

    def score(self, block: Block) -> Scored:
        s, t = block.s, block.t
        base = s.base_rows(self.merge)
        log_S, log_T = s.merged(base), t.merged(t.base_rows(self.merge))
        value = torch.zeros_like(log_S[:, 0])
        matched_S, matched_T = torch.zeros_like(value), torch.zeros_like(value)
        # q dL/dq for the merged probabilities q, in parts with their ids.
        parts: list[tuple[Tensor | None, Tensor]] = []
        if self.pairs is not None and self.jsd is not None:
            pair = self._pair(self.pairs, log_S, log_T)
            matched_S, matched_T = pair.mass_S.sum(1), pair.mass_T.sum(1)
            # Its value and direction are linear in the masses, so they need not sum to 1; each id's term is
            # not negative, and 0 where the masses are equal.
            # The teacher's logarithms are no longer needed: scratch memory.
            terms = self.jsd.terms(pair, pair.log_ratio, self._lend("pair.T", pair.log_ratio))
            value = value + self.weights[0] * terms.value
            parts.append((self.pairs.ids_S, terms.direction.mul_(self.weights[0] * terms.scale)))
        rest_value, rest_part = self._rest(log_S, log_T)
        parts.append(rest_part)
        if block.weight_g is not None:
            _gradient(s, base, log_S, parts, block.weight_g.to(log_S.dtype))
        return Scored(value + rest_value, matched_S, matched_T)

    def _pair(self, pairs: ExactPairs, log_S: Tensor, log_T: Tensor) -> Pair:
        log_S, log_T = self._pick(log_S, pairs.ids_S, "pair.S"), self._pick(log_T, pairs.ids_T, "pair.T")
        mass_S = torch.exp(log_S, out=self._lend("mass.S", log_S)())
        mass_T = torch.exp(log_T, out=self._lend("mass.T", log_T)())
        return Pair(mass_S, mass_T, log_S.sub_(log_T))

    def _rest(self, log_S: Tensor, log_T: Tensor) -> tuple[Tensor, tuple[Tensor | None, Tensor]]:
        """Weighted value `[g]`, and `q dL/dq` with its ids (None: all)."""
        ids_S, ids_T = (None, None) if self.pairs is None else (self.pairs.rest_S, self.pairs.rest_T)
        if self.weights[1] == 0.0:
            num = log_S.shape[1] if ids_S is None else ids_S.shape[0]
            return log_S.new_zeros(log_S.shape[0]), (ids_S, log_S.new_zeros(log_S.shape[0], num))
        q_S = self._pick(log_S, ids_S, "rest.S").exp_()
        q_T = self._pick(log_T, ids_T, "rest.T").exp_()
        l1, sign = sorted_l1(q_S, q_T, self.workspace)
        return l1 * self.weights[1], (ids_S, q_S.mul_(sign).mul_(self.weights[1]))

    def _pick(self, matrix: Tensor, ids: Tensor | None, name: str) -> Tensor:
        shape = (matrix.shape[0], matrix.shape[1] if ids is None else ids.shape[0])
        out = self.workspace.take(f"bridge.{name}", shape, matrix.dtype, matrix.device)
        return out.copy_(matrix) if ids is None else torch.index_select(matrix, 1, ids, out=out)

    def _lend(self, name: str, like: Tensor) -> Callable[[], Tensor]:
        return lambda: self.workspace.take(f"bridge.{name}", tuple(like.shape), like.dtype, like.device)


def _gradient(
    s: Side, base: Tensor, merged: Tensor, parts: list[tuple[Tensor | None, Tensor]], weight: Tensor
) -> None:
    """`dz = u - p sum(u)` at the base rows, `sum(u) (onehot - p)` at the others, over the logits.

    u = q dL/dq, and q is a product of probabilities, so each factor contributes its log-derivative.
    """
    total = torch.zeros_like(weight)
    for ids, part in parts:
        part.mul_(weight.unsqueeze(1))
        total = total + part.sum(1)
        if ids is None:
            merged.copy_(part)
        else:
            merged.scatter_(1, ids.expand(part.shape[0], -1), part)
    share = (total[s.group] / s.log_mass.exp()).neg_()
    s.mass.mul_(share.unsqueeze(1))
    if s.is_single:  # merged and the logits are the same memory
        s.logits.add_(s.mass)
    else:
        s.logits.copy_(s.mass)
        s.logits.index_add_(0, base, merged)
        at_label = total[s.group].index_fill(0, base, 0.0)
        s.logits.scatter_add_(1, s.labels.unsqueeze(1), at_label.unsqueeze(1))
