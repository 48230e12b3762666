"""Divergences on top-k supports, and targets without hidden states.

Per token, each teacher's divergence is that of two small distributions over the members of a set A and, with
a tail, one category for all other tokens. If P_c are the student's probabilities of these categories and
g_c = dD/dP_c, then `dz_v = p_v (g_c - sum_c P_c g_c)` with v's own category c: a sparse correction on A, and
one number per row that multiplies p_S elsewhere. Without a tail, g is 0 outside A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mergeopd.loss.divergence import Divergence, ForwardKL, Pair, ReverseKL
from mergeopd.loss.full_vocabulary import BlockStats
from mergeopd.loss.heads import Hidden
from mergeopd.loss.softmax import Block, Softmaxes, entropy_and_logprob
from mergeopd.loss.support import Members, Support, top_ids
from mergeopd.loss.targets import Target, TopK

# Lower bound of a tail mass: its logarithm and reciprocal are finite, its product with a teacher's mass is 0.
_LEAST_TAIL = {torch.float64: 1e-300, torch.float32: 1e-30}


@dataclass(frozen=True, eq=False)
class Reduced:
    """One teacher's divergences on its support: `inside [D, n, a]` and `outside [D, n]` make `dz`.

    Without the objective's factors, `dz = inside` on the members and `p_S * outside` elsewhere.
    """

    members: Members
    value: Tensor  # [D, n]
    inside: Tensor
    outside: Tensor


@dataclass(frozen=True, eq=False)
class SupportScored:
    """A block between its statistics and its gradient."""

    stats: BlockStats
    block: Block
    per_mass_S: Tensor  # [n]: p_S = block.masses[0] * per_mass_S
    reduced: tuple[Reduced, ...]  # one per target, none without divergences

    @property
    def student_ranking(self) -> Tensor:
        return self.block.logits[0]

    def logit_gradient(self, grad_divergence: Tensor, grad_logprob: Tensor | None, out: Tensor) -> None:
        """Write the gradient as `full_vocabulary.Scored.logit_gradient` does."""
        mass, gain = self.block.masses[0], self.block.student.gain
        per_mass = self.per_mass_S * gain
        if grad_logprob is None:
            out.zero_()
        else:
            torch.mul(mass, (-grad_logprob * per_mass).unsqueeze(1), out=out)
        for reduced, grad_Dn in zip(self.reduced, grad_divergence[: len(self.reduced)], strict=True):
            members = reduced.members
            inside = torch.linalg.vecdot(grad_Dn.unsqueeze(2), reduced.inside, dim=0).mul_(gain)
            outside = torch.linalg.vecdot(grad_Dn, reduced.outside, dim=0).mul_(per_mass)
            # Overwrite at the members instead of adding: both parts can be large there, and cancel.
            at_members = out[members.row, members.column] + inside[members.row, members.slot]
            out.addcmul_(mass, outside.unsqueeze(1))
            out[members.row, members.column] = at_members
        self.block.finish_gradient(grad_logprob, out)


@dataclass(frozen=True, eq=False)
class SupportScorer:
    """Scores blocks of rows against targets of any kind; with divergences, on a support."""

    softmaxes: Softmaxes
    targets: Sequence[Target]
    divergences: Sequence[Divergence]
    support: Support | None
    all_ids: range

    @cached_property
    def _places(self) -> list[int]:
        """Return the index of each target's logits in a block, after the student's; 0 for none."""
        place = iter(range(1, len(self.targets) + 1))
        return [next(place) if isinstance(target, Hidden) else 0 for target in self.targets]

    def score(self, raw: Tensor | Sequence[Tensor], rows: slice, *, with_grad: bool) -> SupportScored:
        raw_S = raw[0]
        block = self.softmaxes.begin(raw, rows, with_grad=with_grad)
        moments = self.softmaxes.sum(torch.stack(block.sums)).view(len(block.logits), 3, -1)
        log_mass, entropy, logprob = entropy_and_logprob(moments)
        logprob_T, entropy_T = raw_S.new_empty(2, len(self.targets), raw_S.shape[0])
        for k, (target, place) in enumerate(zip(self.targets, self._places, strict=True)):
            if isinstance(target, Hidden):
                logprob_T[k], entropy_T[k] = logprob[place], entropy[place]
            else:
                logprob_T[k], entropy_T[k] = target.logprob[rows], target.entropy[rows]
        reduced: tuple[Reduced, ...] = ()
        divergence = raw_S.new_empty(len(self.targets), 0, raw_S.shape[0])
        if self.support is not None and self.divergences:
            reduced = self._reduce(self.support, block, log_mass, rows)
            divergence = torch.stack([one.value for one in reduced])
        stats = BlockStats(divergence, logprob[0], logprob_T, entropy[0], entropy_T)
        return SupportScored(stats, block, moments[0, 0].reciprocal(), reduced)

    def _reduce(self, support: Support, block: Block, log_mass: Tensor, rows: slice) -> tuple[Reduced, ...]:
        """Compute all divergences of all targets from centred logits and masses. Performs two collectives."""
        supports = self._members(support, block, rows)
        local = [
            _categories(support, members, block.logits[m], block.masses[m])
            for members, place in zip(supports, self._places, strict=True)
            for m in ((0, place) if place else (0,))
        ]
        summed = self.softmaxes.sum(torch.cat(local, 1))
        sums = iter(torch.split(summed, [part.shape[1] for part in local], dim=1))
        reduced = []
        for members, target, place in zip(supports, self.targets, self._places, strict=True):
            log_S = _log_categories(support, next(sums), log_mass[0])
            if isinstance(target, TopK):
                log_T = _known_log_categories(support, target, rows, log_S.dtype)
            else:
                log_T = _log_categories(support, next(sums), log_mass[place])
            has_tail = members.num < len(self.all_ids)
            is_category = members.is_first_na
            if support.rest == "tail":
                is_category = torch.cat([is_category, has_tail.unsqueeze(1)], 1)
            pair = Pair(
                torch.where(is_category, log_S.exp(), 0.0),
                torch.where(is_category, log_T.exp(), 0.0),
                torch.where(is_category, log_S - log_T, 0.0),
            )
            reduced.append(_measure(self.divergences, support, members, has_tail, pair))
        return tuple(reduced)

    def _members(self, support: Support, block: Block, rows: slice) -> list[Members]:
        """Choose each target's support, with one collective for all models."""
        softmaxes = self.softmaxes
        places = [m for m in self._places if m and support.of != "student"]
        is_given = support.of == "teacher" or all(isinstance(target, TopK) for target in self.targets)
        choosers = [*([] if is_given else [0]), *places]
        if support.k >= len(self.all_ids):
            everything = torch.tensor(self.all_ids, device=block.logits[0].device)
            chosen = {m: everything.expand(block.logits[0].shape[0], -1) for m in choosers}
        else:
            ids = top_ids([block.logits[m] for m in choosers], support.k, softmaxes.vocab, softmaxes.group)
            chosen = dict(zip(choosers, ids, strict=True))
        if support.of == "student":
            given = [target.ids[rows] if isinstance(target, TopK) else chosen[0] for target in self.targets]
            located = {id(ids): Members.locate(ids, softmaxes.vocab) for ids in given}
            return [located[id(ids)] for ids in given]
        members = []
        for target, place in zip(self.targets, self._places, strict=True):
            own = target.ids[rows] if isinstance(target, TopK) else chosen[place]
            both = own if support.of == "teacher" else torch.cat([chosen[0], own], 1)
            members.append(Members.locate(both, softmaxes.vocab))
        return members


def log_tail_mass(mass: Tensor) -> Tensor:
    """Return the log of a tail's mass, bounded from below; masses are relative to the largest."""
    return mass.clamp(min=_LEAST_TAIL[mass.dtype]).log_()


def _categories(support: Support, members: Members, logits: Tensor, mass: Tensor) -> Tensor:
    """This shard's part of the members' centred logits and, with a tail, the others' mass, `[n, a + 1]`."""
    inside = members.take(logits)
    if support.rest == "generalised":
        return inside
    return torch.cat([inside, members.sum_outside(mass).unsqueeze(1)], 1)


def _log_categories(support: Support, sums: Tensor, log_mass_n: Tensor) -> Tensor:
    """Log-probabilities of the categories, from the results of `_categories` summed over the shards."""
    if support.rest == "tail":
        sums[:, -1] = log_tail_mass(sums[:, -1])
    return sums - log_mass_n.unsqueeze(1)


def _known_log_categories(support: Support, target: TopK, rows: slice, dtype: torch.dtype) -> Tensor:
    """Log-probabilities of the categories of a `TopK` target, in the order of the sorted ids."""
    logs = target.logprobs[rows].gather(1, target.ids[rows].argsort(1))
    if support.rest == "tail":
        logs = torch.cat([logs, target.log_tail[rows].unsqueeze(1)], 1)
    return logs.to(dtype)


def _measure(
    divergences: Sequence[Divergence], support: Support, members: Members, has_tail: Tensor, pair: Pair
) -> Reduced:
    """Compute each divergence between the two small distributions, and its logit gradient's two parts."""
    num_members = members.ids_na.shape[1]
    mass_S = pair.mass_S[:, :num_members]
    values, insides, outsides = [], [], []
    for divergence in divergences:
        terms = divergence.terms(
            pair, torch.empty_like(pair.log_ratio), lambda: torch.empty_like(pair.log_ratio)
        )
        value, push = terms.value, terms.direction * terms.scale
        if support.rest == "generalised":
            value, push = _generalised(divergence, pair, value, push)
        total = push.sum(1)
        outside = -total
        if support.rest == "tail":
            outside = outside + torch.where(has_tail, push[:, -1] / pair.mass_S[:, -1], 0.0)
        values.append(value)
        insides.append(push[:, :num_members] - mass_S * total.unsqueeze(1))
        outsides.append(outside)
    return Reduced(members, torch.stack(values), torch.stack(insides), torch.stack(outsides))


def _generalised(divergence: Divergence, pair: Pair, value: Tensor, push: Tensor) -> tuple[Tensor, Tensor]:
    """A KL's sum over the members, and `p_S g`, made zero and stationary where both models agree."""
    lack = pair.mass_T - pair.mass_S
    match divergence:
        case ForwardKL():
            return value - lack.sum(1), -lack
        case ReverseKL():  # its -p_S takes away the constant 1 that terms() leaves out of g
            return value + lack.sum(1), push
    raise AssertionError(f"check_support should have rejected {divergence}")
