"""A block of whole groups, and both models' softmaxes in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mergeopd.loss.cross_tokenizer.groups import group_of_rows, sum_rows
from mergeopd.loss.heads import Projection

MergeStrategy = Literal["observed", "bayesian"]


@dataclass(frozen=True, eq=False)
class Side:
    """One model's rows in a block.

    logits `[n, V]` are centred, in the memory of the raw ones; mass `[n, V]` are their exponentials, in a
    buffer that the next block reuses; log_mass `[n]`; logprob `[n]` of the labels; group `[n]`; num `[g]`.
    """

    projection: Projection
    logits: Tensor
    mass: Tensor
    log_mass: Tensor
    logprob: Tensor
    labels: Tensor
    group: Tensor
    num: Tensor

    @classmethod
    def begin(
        cls, projection: Projection, raw: Tensor, labels: Tensor, num: Tensor, *, with_slope: bool
    ) -> Side:
        """Compute the softmaxes of a block's rows; `with_slope` keeps the soft cap's slope for gradients."""
        slope = projection.take("slope", raw.shape[0]) if with_slope and projection.is_capped else None
        projection.finish_logits(raw, slope)
        raw.sub_(raw.amax(1, keepdim=True))
        mass = torch.exp(raw, out=projection.take("mass", raw.shape[0]))
        log_mass = mass.sum(1).log_()
        logprob = raw.gather(1, labels.unsqueeze(1)).squeeze(1) - log_mass
        return cls(projection, raw, mass, log_mass, logprob, labels, group_of_rows(num), num)

    @property
    def is_single(self) -> bool:
        """Whether every group is one row."""
        return self.logits.shape[0] == self.num.shape[0]

    def group_logprob(self) -> Tensor:
        """`[g]`: the groups' log-probabilities by the chain rule."""
        return sum_rows(self.logprob, self.num)

    def base_rows(self, merge: MergeStrategy) -> Tensor:
        """`[g]`: the row of each group whose whole distribution is kept."""
        stop = self.num.cumsum(0)
        return stop - 1 if merge == "bayesian" else stop - self.num

    def merged(self, base: Tensor) -> Tensor:
        """`[g, V]` log-probabilities of the base rows, plus those of the others' labels. May end `logits`."""
        if self.is_single:
            return self.logits.sub_(self.log_mass.unsqueeze(1))
        is_base = torch.zeros_like(self.group, dtype=torch.bool)
        is_base[base] = True
        others = sum_rows(torch.where(is_base, 0.0, self.logprob), self.num)
        out = torch.index_select(self.logits, 0, base, out=self.projection.take("merged", base.shape[0]))
        return out.add_((others - self.log_mass[base]).unsqueeze(1))

    def finish_gradient(self) -> None:
        """Convert the gradient of tempered logits, in the memory of `logits`, to that of raw logits."""
        if self.projection.gain != 1.0:
            self.logits.mul_(self.projection.gain)
        if self.projection.is_capped:
            self.logits.mul_(self.projection.take("slope", self.logits.shape[0]))


class Block(NamedTuple):
    """g whole groups: both models' rows, and whether each group continues the preceding one.

    weight_g: the groups' factors in the loss, or None without gradients, which overwrite `s.logits`.
    """

    s: Side
    t: Side
    follows: Tensor | None
    weight_g: Tensor | None


class Scored(NamedTuple):
    """Per group `[g]`; see `BridgeStats`."""

    value: Tensor
    matched_S: Tensor
    matched_T: Tensor
