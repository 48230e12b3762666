"""Divergences between two next-token distributions, each one small pure function.

Every logit gradient has the form `dz = p_S * (g - <p_S, g>)` with `g = dD/dp_S`, and is the
same for `g` plus any constant. So a divergence returns two results per row: its value, and its *direction*
`p_S * g` as a matrix, from which the kernel computes `dz = direction - p_S * sum(direction)`.

With a sharded vocabulary the normalisers are known only after a sum over the shards. The two KLs are linear
in the log-ratio, so a constant missing from it can be added afterwards: two reductions (maxima; sums). The
others need normalised log-probabilities first, and a third reduction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor


class Pair(NamedTuple):
    """Student and one teacher on a block of rows, `[n, V]` each.

    Normalised (the last field true): `mass_S = p_S`, `mass_T = p_T`, `log_ratio = log p_S - log p_T`.
    Otherwise each mass is a multiple of the probabilities, and the log-ratio lacks a constant, per row.
    """

    mass_S: Tensor
    mass_T: Tensor
    log_ratio: Tensor


class Terms(NamedTuple):
    """Per-row sums over the given columns, `[n]`, and the direction: `p_S * g = scale * direction`.

    `direction_sum` sums `direction` without its scale.
    """

    value: Tensor
    direction: Tensor
    direction_sum: Tensor
    scale: float


# Columns from which a dot product per row is faster than one call that writes all products and adds them up.
_DOT_COLUMNS = 8192


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Return the dot product of each row of two matrices, `[n]`."""
    if a.device.type != "cpu" or a.shape[1] < _DOT_COLUMNS:
        products: Tensor = torch.linalg.vecdot(a, b)
        return products
    return torch.stack([torch.dot(x, y) for x, y in zip(a, b, strict=True)])


@dataclass(frozen=True)
class ForwardKL:
    """KL(p_T ‖ p_S); `dz = p_S - p_T`."""

    num_reductions: ClassVar[Literal[2, 3]] = 2
    own_direction: ClassVar[bool] = False  # the direction is the teacher's mass, unchanged
    uses_mass_T: ClassVar[bool] = True

    def terms(self, pair: Pair, out: Tensor, scratch: Callable[[], Tensor]) -> Terms:
        value = row_dots(pair.mass_T, pair.log_ratio).neg_()
        return Terms(value, pair.mass_T, pair.mass_T.sum(1), scale=-1.0)


@dataclass(frozen=True)
class ReverseKL:
    """KL(p_S ‖ p_T); `dz = p_S * (log p_S - log p_T - KL)`."""

    num_reductions: ClassVar[Literal[2, 3]] = 2
    own_direction: ClassVar[bool] = True
    uses_mass_T: ClassVar[bool] = False

    def terms(self, pair: Pair, out: Tensor, scratch: Callable[[], Tensor]) -> Terms:
        direction = torch.mul(pair.mass_S, pair.log_ratio, out=out)
        value = direction.sum(1)
        return Terms(value, direction, value, scale=1.0)


class Normalised:
    """Properties of divergences that need normalised log-probabilities."""

    num_reductions: ClassVar[Literal[2, 3]] = 3
    own_direction: ClassVar[bool] = True
    uses_mass_T: ClassVar[bool] = True


def largest_log(dtype: torch.dtype) -> float:
    """Return the log-ratio beyond which one probability is negligible and an exponential would overflow."""
    return 700.0 if dtype == torch.float64 else 80.0


@dataclass(frozen=True)
class JSD(Normalised):
    """Generalised Jensen-Shannon divergence, `beta` in (0, 1), as in GKD (2306.13649) and TRL.

    `M = beta p_T + (1 - beta) p_S`; value `beta KL(p_T ‖ M) + (1 - beta) KL(p_S ‖ M)`. It vanishes at both
    ends (`JSD / beta -> ForwardKL` as beta -> 0), which is why the ends are refused and not special cases.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"JSD: beta is {self.beta}, must lie strictly between 0 and 1; "
                "the ends are ForwardKL and ReverseKL"
            )

    def terms(self, pair: Pair, out: Tensor, scratch: Callable[[], Tensor]) -> Terms:
        beta = self.beta
        # log(M / p_S) = log1p(beta * expm1(log p_T - log p_S)): exact at equality, where log M - log p_S is
        # only rounding.
        bound = largest_log(out.dtype)
        excess = torch.neg(pair.log_ratio, out=scratch()).clamp_(max=bound)
        torch.log1p(excess.expm1_().mul_(beta), out=excess)
        # The clamped ratio once more, so that log(M / p_T) keeps its limit log(beta).
        torch.clamp(pair.log_ratio, min=-bound, out=out).add_(excess)
        teacher = row_dots(pair.mass_T, out)
        direction = torch.mul(pair.mass_S, excess, out=out)
        student = direction.sum(1)
        value = teacher.mul_(-beta).sub_(student, alpha=1.0 - beta)
        return Terms(value, direction, student, scale=beta - 1.0)


class Divergence(Protocol):
    """A divergence that the kernel can compute.

    `num_reductions`: all-reduces over the ranks of a sharded vocabulary. `own_direction`: whether the
    direction needs its own memory. `uses_mass_T`: whether `terms` reads the teacher's mass.
    """

    num_reductions: ClassVar[Literal[2, 3]]
    own_direction: ClassVar[bool]
    uses_mass_T: ClassVar[bool]

    def terms(self, pair: Pair, out: Tensor, scratch: Callable[[], Tensor]) -> Terms:
        """Compute value and direction on a block of rows.

        `pair` must not be changed, except that `out` may share the log-ratio's memory: write to it after the
        last use of the log-ratio. `scratch()` returns one more `[n, V]` buffer.
        """
