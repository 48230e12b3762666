"""Divergences beyond the KLs: each needs normalised log-probabilities, so three reductions.

All are sums over the vocabulary of a function of (p_S, p_T); `g = dD/dp_S` up to a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mergeopd.loss.divergence import Normalised, Pair, Terms, largest_log, row_dots

# 1 + (1 - alpha) expm1(x) cancels to alpha far from equality: below this, float32 keeps under four digits.
_LEAST_SKEW = 1e-3


@dataclass(frozen=True)
class TVD(Normalised):
    """Total variation distance, `1/2 sum |p_S - p_T|`, in [0, 1]; `g = 1/2 sign(p_S - p_T)`."""

    def terms(self, pair: Pair, out: Tensor, scratch: Callable[[], Tensor]) -> Terms:
        sign = torch.sign(pair.log_ratio, out=scratch())
        # sum |p_S - p_T| = sum sign (p_S - p_T)
        teacher = row_dots(sign, pair.mass_T)
        direction = torch.mul(pair.mass_S, sign, out=out)
        student = direction.sum(1)
        return Terms((student - teacher).mul_(0.5), direction, student, scale=0.5)


@dataclass(frozen=True)
class Skewed(Normalised):
    """A divergence from one distribution to a mixture that contains it with the share `alpha`."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        if not _LEAST_SKEW <= self.alpha < 1.0:
            raise ValueError(
                f"{self}: alpha must lie in [{_LEAST_SKEW}, 1); at 0 use the plain KL, at 1 it vanishes"
            )


@dataclass(frozen=True)
class SkewForwardKL(Skewed):
    """`KL(p_T ‖ alpha p_T + (1 - alpha) p_S)`, alpha in [0.001, 1) (DistiLLM, 2402.03898).

    `g = -(1 - alpha) p_T / M`, bounded because M is nowhere smaller than alpha p_T.
    """

    def terms(self, pair: Pair, out: Tensor, scratch: Callable[[], Tensor]) -> Terms:
        alpha, bound = self.alpha, largest_log(out.dtype)
        # M / p_T = alpha + (1 - alpha) exp(log p_S - log p_T) = 1 + (1 - alpha) expm1(log-ratio)
        ratio = torch.clamp(pair.log_ratio, min=-bound, max=bound, out=scratch())
        ratio.expm1_().mul_(1.0 - alpha)
        log_ratio = torch.log1p(ratio, out=out)
        value = row_dots(pair.mass_T, log_ratio).neg_()
        # p_S p_T / M
        direction = torch.div(pair.mass_S, ratio.add_(1.0), out=out)
        return Terms(value, direction, direction.sum(1), scale=alpha - 1.0)


@dataclass(frozen=True)
class SkewReverseKL(Skewed):
    """`KL(p_S ‖ (1 - alpha) p_T + alpha p_S)`, alpha in [0.001, 1) (DistiLLM, 2402.03898).

    `g = log(p_S / M) - alpha p_S / M`.
    """

    uses_mass_T: ClassVar[bool] = False

    def terms(self, pair: Pair, out: Tensor, scratch: Callable[[], Tensor]) -> Terms:
        alpha, bound = self.alpha, largest_log(out.dtype)
        # M / p_S = 1 + (1 - alpha) expm1(log p_T - log p_S)
        ratio = torch.neg(pair.log_ratio, out=scratch()).clamp_(min=-bound, max=bound)
        ratio.expm1_().mul_(1.0 - alpha)
        # log(p_S / M)
        log_part = torch.log1p(ratio, out=out).neg_()
        value = row_dots(pair.mass_S, log_part)
        log_part.sub_(ratio.add_(1.0).reciprocal_(), alpha=alpha)
        direction = log_part.mul_(pair.mass_S)
        return Terms(value, direction, direction.sum(1), scale=1.0)


@dataclass(frozen=True)
class ClippedForwardKL(Normalised):
    """`sum min(p_T log(p_T / p_S), bound)`: forward KL whose large entries are capped (OPSD, 2601.18734).

    Capped entries have no gradient; negative ones are never capped, so the value can be negative and is no
    divergence. `g = -p_T / p_S` on the others.
    """

    bound: float

    def __post_init__(self) -> None:
        # With a bound below 0, every token without mass would add the bound to the value.
        if not self.bound >= 0.0:
            raise ValueError(f"{self}: bound must be at least 0")

    def terms(self, pair: Pair, out: Tensor, scratch: Callable[[], Tensor]) -> Terms:
        entry = torch.mul(pair.mass_T, pair.log_ratio, out=scratch()).neg_()
        direction = torch.mul(pair.mass_T, entry < self.bound, out=out)
        value = entry.clamp_(max=self.bound).sum(1)
        return Terms(value, direction, direction.sum(1), scale=-1.0)


@dataclass(frozen=True)
class AlphaDivergence(Normalised):
    """`(1 - sum p_T^alpha p_S^(1 - alpha)) / (alpha (1 - alpha))`, alpha in (0, 1) (Amari).

    Tends to the reverse KL as alpha -> 0 and to the forward KL as alpha -> 1; at 1/2 it is 4 times the
    squared Hellinger distance. `g = -(p_T / p_S)^alpha / alpha`.
    """

    uses_mass_T: ClassVar[bool] = False

    alpha: float

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha < 1.0:
            raise ValueError(f"{self}: alpha must lie strictly between 0 and 1; the ends are the two KLs")

    def terms(self, pair: Pair, out: Tensor, scratch: Callable[[], Tensor]) -> Terms:
        alpha, bound = self.alpha, largest_log(out.dtype)
        # p_S ((p_T / p_S)^alpha - 1): g is free up to a constant; the -1 makes equal models exactly 0.
        power = torch.neg(pair.log_ratio, out=scratch()).clamp_(min=-bound, max=bound).mul_(alpha).expm1_()
        direction = torch.mul(power, pair.mass_S, out=out)
        total = direction.sum(1)
        return Terms(total * (-1.0 / (alpha * (1.0 - alpha))), direction, total, scale=-1.0 / alpha)
