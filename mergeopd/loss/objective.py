"""The objective as a per-token function of the fused pass's statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from mergeopd.loss.blocks import BlockStats
from mergeopd.loss.divergence import JSD, Divergence, ForwardKL, ReverseKL


@dataclass(frozen=True, slots=True)
class DistillationObjective:
    """`sum_k w_k sum_d c_d tau^2 D_d(teacher k, student) - w_nll log p_S(y)` per token.

    `names`, `divergences` and `coefficients` belong together; `temperature` (tau) applies to the
    divergences, whose gradient scale the square keeps (Hinton 2015). The weights w come with the tokens,
    denominators included.
    """

    names: tuple[str, ...]
    divergences: tuple[Divergence, ...]
    coefficients: tuple[float, ...]
    temperature: float = 1.0
    nll: float = 0.0

    def per_token(
        self, teacher_weight_KN: Tensor, nll_weight_N: Tensor
    ) -> Callable[[BlockStats, slice], Tensor]:
        """The function that `fused_loss` calls for each block of rows."""
        scale = self.temperature**2

        def loss(stats: BlockStats, rows: slice) -> Tensor:
            total = -self.nll * nll_weight_N[rows] * stats.logprob_S
            for d, coefficient in enumerate(self.coefficients):
                total = total + scale * coefficient * (
                    teacher_weight_KN[:, rows] * stats.divergence[:, d]
                ).sum(0)
            return total

        return loss


def build_objective(
    *,
    reverse_kl: float,
    forward_kl: float,
    jsd: float,
    jsd_beta: float,
    nll: float,
    temperature: float,
) -> DistillationObjective:
    """The objective with those weights; terms of weight 0 are not computed."""
    terms: Sequence[tuple[str, Divergence, float]] = [
        ("reverse_kl", ReverseKL(), reverse_kl),
        ("forward_kl", ForwardKL(), forward_kl),
        ("jsd", JSD(jsd_beta), jsd),
    ]
    used = [term for term in terms if term[2]]
    return DistillationObjective(
        names=tuple(name for name, _, _ in used),
        divergences=tuple(divergence for _, divergence, _ in used),
        coefficients=tuple(weight for _, _, weight in used),
        temperature=temperature,
        nll=nll,
    )
