"""A block of whole groups, and both models' softmaxes in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mergeopd.loss.buffers import Workspace
from mergeopd.loss.cross_tokenizer.groups import group_of_rows, sum_rows

MergeStrategy = Literal["observed", "bayesian"]


@dataclass(frozen=True, eq=False)
class Side:
    """One model's rows in a block.

    logits `[n, V]` are centred, in the memory of the given ones; mass `[n, V]` are their exponentials, in a
    buffer that the next block reuses; log_mass `[n]`; logprob `[n]` of the labels; group `[n]`; num `[g]`.
    """

    name: str
    workspace: Workspace
    logits: Tensor
    mass: Tensor
    log_mass: Tensor
    logprob: Tensor
    labels: Tensor
    group: Tensor
    num: Tensor

    @classmethod
    def begin(cls, name: str, logits: Tensor, labels: Tensor, num: Tensor, workspace: Workspace) -> Side:
        """Compute the softmaxes of a block's rows from their logits at the loss temperature."""
        logits.sub_(logits.amax(1, keepdim=True))
        like = tuple(logits.shape), logits.dtype, logits.device
        mass = torch.exp(logits, out=workspace.take(f"{name}.mass", *like))
        log_mass = mass.sum(1).log_()
        logprob = logits.gather(1, labels.unsqueeze(1)).squeeze(1) - log_mass
        return cls(name, workspace, logits, mass, log_mass, logprob, labels, group_of_rows(num), num)

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
        shape, dtype, device = (len(base), self.logits.shape[1]), self.logits.dtype, self.logits.device
        out = self.workspace.take(f"{self.name}.merged", shape, dtype, device)
        torch.index_select(self.logits, 0, base, out=out)
        return out.add_((others - self.log_mass[base]).unsqueeze(1))


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
