"""The teacher's next-token distribution, converted to the student's tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergeopd.loss.cross_tokenizer.maps import PieceTable
from mergeopd.loss.cross_tokenizer.rows import Block, Scored, Side
from mergeopd.loss.divergence import JSD, ForwardKL, Pair

# Bound of log(probability of a longer token / probability of the tokenization at hand).
_LARGEST_LOG = 60.0
# Lower clamp of a probability before its logarithm; its product with a teacher's mass of 0 stays 0.
_LEAST = 1e-30


@dataclass(frozen=True, eq=False)
class _Begun:
    """The teacher at an earlier boundary of the same text: `p_T [V_T]`, the student's tokens since, and the
    teacher's log-probability of the same stretch."""

    p_T: Tensor
    tokens: tuple[int, ...]
    logprob: float


@dataclass(eq=False)
class PieceScorer:
    """A divergence in the student's vocabulary, on the rows determined by a group's first teacher row."""

    table: PieceTable
    divergence: ForwardKL | JSD
    begun: list[_Begun] = field(default_factory=list)

    def score(self, block: Block) -> Scored:
        s, t = block.s, block.t
        first_S, first_T = s.base_rows("observed"), t.base_rows("observed")
        p_T = t.mass[first_T] / t.log_mass[first_T].exp().unsqueeze(1)
        rows, groups = [first_S], [torch.arange(len(first_S), device=p_T.device)]
        targets = [self._with_longer(self._first(p_T, s.labels[first_S], t.labels[first_T], t), p_T, block)]
        for position in range(1, int(s.num.max())):
            group = ((s.num > position) & (t.num == 1)).nonzero().squeeze(1)
            if not len(group):
                continue
            label_T = t.labels[first_T[group]]
            q_later, known = self._later(p_T[group], label_T, s.labels, first_S[group], position)
            rows.append(first_S[group][known] + position)
            groups.append(group[known])
            targets.append(q_later[known])
        row, group, q_T = torch.cat(rows), torch.cat(groups), torch.cat(targets)
        share = 1.0 / torch.bincount(group, minlength=len(first_S)).to(q_T.dtype)
        log_S = s.logits[row] - s.log_mass[row].unsqueeze(1)
        pair = Pair(log_S.exp(), q_T, log_S - q_T.clamp_min(_LEAST).log())
        terms = self.divergence.terms(pair, torch.empty_like(log_S), lambda: torch.empty_like(log_S))
        value = torch.zeros_like(share).index_add_(0, group, terms.value * share[group])
        is_first = slice(0, len(first_S))
        matched_S = pair.mass_S[is_first].index_select(1, self.table.covered).sum(1)
        if block.weight_g is not None:
            weight = terms.scale * (block.weight_g.to(share.dtype) * share)[group]
            u = terms.direction * weight.unsqueeze(1)
            dz = u - pair.mass_S * u.sum(1, keepdim=True)
            s.logits.zero_().index_add_(0, row, dz)
        return Scored(value, matched_S, q_T[is_first].sum(1))

    def _first(self, p_T: Tensor, label_S: Tensor, label_T: Tensor, t: Side) -> Tensor:
        """`[g, V_S]`: the distribution of the student's first token implied by the teacher's next tokens.

        The group's probability is known exactly: it is moved from the student token that begins the table's
        spelling of the teacher's first token to the token that the student generated.
        """
        q = self._pieces(p_T, 0)
        begins, chain = self.table.ids[label_T, 0], t.group_logprob().exp()
        moved = torch.where(begins >= 0, chain, 0.0)
        q.scatter_add_(1, begins.clamp_min(0).unsqueeze(1), -moved.unsqueeze(1)).clamp_min_(0.0)
        return q.scatter_add_(1, label_S.unsqueeze(1), chain.unsqueeze(1))

    def _with_longer(self, q: Tensor, p_T: Tensor, block: Block) -> Tensor:
        """Add the mass of teacher tokens that begin earlier and cover this boundary.

        The absence of a longer token carries no information about the text, since the student cannot choose
        one. Given the text only, the teacher's continuation is a mixture of the tokenization at hand (weight
        1 here) and of every longer token that begins with the same pieces (its probability divided by that of
        the tokenization at hand).
        """
        labels, sizes = block.s.labels.tolist(), block.s.num.tolist()
        chains = block.t.group_logprob().tolist()
        follows = [False] * len(sizes) if block.follows is None else block.follows.tolist()
        # For every group and boundary: the teacher's distribution and its factor, places in q, tokens.
        sources: list[tuple[Tensor, float]] = []
        places: list[Tensor] = []
        token_ids: list[Tensor] = []
        at = 0
        for g, (size, is_continued, chain) in enumerate(zip(sizes, follows, chains, strict=True)):
            own, at = labels[at : at + size], at + size
            moved = []
            for begun in self.begun if is_continued else ():
                ids, piece = self.table.longer(begun.tokens)
                if not len(ids):
                    continue
                sources.append((begun.p_T, math.exp(min(-begun.logprob, _LARGEST_LOG))))
                places.append(g * q.shape[1] + piece)
                token_ids.append(ids)
                moved.append(_Begun(begun.p_T, (*begun.tokens, *own), begun.logprob + chain))
            self.begun = [*moved, _Begun(p_T[g], tuple(own), chain)]
        if not sources:
            return q
        q_sums = q.sum(1)
        each = torch.split(torch.cat(token_ids).to(q.device), [len(ids) for ids in token_ids])
        mass = [p[ids] * factor for (p, factor), ids in zip(sources, each, strict=True)]
        q.view(-1).index_add_(0, torch.cat(places).to(q.device), torch.cat(mass))
        return q.div_((1.0 + (q.sum(1) - q_sums)).unsqueeze(1))

    def _later(
        self, p_T: Tensor, label_T: Tensor, labels_S: Tensor, first: Tensor, position: int
    ) -> tuple[Tensor, Tensor]:
        """The student's token number `position` of each group, given those before it in one teacher token.

        Returns `[r, V_S]`, and where it has any mass. The group's teacher token is split as the student did,
        which may differ from the table's spelling; otherwise all its mass would go to other tokens that begin
        with the student's pieces.
        """
        ids, label_T = self.table.ids, label_T.unsqueeze(1)
        own = p_T.gather(1, label_T)
        if position < ids.shape[1]:
            fits = (ids[:, position] >= 0).expand(len(first), -1)
            for before in range(position):
                fits = fits & (ids[:, before] == labels_S[first + before].unsqueeze(1))
            others = (p_T * fits).scatter_(1, label_T, 0.0)
            total, q = others.sum(1, keepdim=True) + own, self._pieces(others, position)
        else:
            total, q = own, p_T.new_zeros(len(first), self.table.vocab_S)
        q.scatter_add_(1, labels_S[first + position].unsqueeze(1), own)
        return q / total.clamp_min(_LEAST), total.squeeze(1) > _LEAST

    def _pieces(self, mass: Tensor, position: int) -> Tensor:
        """Scatter the mass `[n, V_T]` of teacher tokens to their piece number `position`, `[n, V_S]`."""
        ids = self.table.ids[:, position]
        known = (ids >= 0).nonzero().squeeze(1)
        out = mass.new_zeros(mass.shape[0], self.table.vocab_S)
        return out.index_add_(1, ids[known], mass.index_select(1, known))
