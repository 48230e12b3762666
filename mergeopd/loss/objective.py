"""The objective as a per-token function of the fused pass's statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergeopd.loss.divergence import Divergence
from mergeopd.loss.full_vocabulary import BlockStats
from mergeopd.loss.policy import Policy, PolicyRows, policy_tokens
from mergeopd.loss.support import Support

# Replaces a divergence where only the sampled token's log-probabilities are known: k3, whose mean over the
# student's own tokens is the reverse KL, and which is never negative (methods: docs/objectives.md).
SAMPLED = "sampled_reverse_kl"


@dataclass(frozen=True, slots=True, eq=False)
class LinearObjective:
    """`sum_kd weight[k, d] D[k, d] - nll log p_S(y)` of each token.

    Its derivatives are known before any statistic, so that `fused_loss` calls it only once, for all tokens.
    weight `[K, D, N]`; nll `[N]`, None for no such term.
    """

    weight_KDN: Tensor
    nll_N: Tensor | None

    def __call__(self, stats: BlockStats, rows: slice) -> Tensor:
        total = (self.weight_KDN[..., rows] * stats.divergence).sum((0, 1))
        return total if self.nll_N is None else total - self.nll_N[rows] * stats.logprob_S

    def derivatives(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Return those by the divergences, `[K, D, n]`, and by `log p_S(y)`, `[n]` or None for zero."""
        return self.weight_KDN[..., rows], None if self.nll_N is None else -self.nll_N[rows]


@dataclass(frozen=True, slots=True)
class DistillationObjective:
    """`sum_k w_k sum_d c_d tau^2 D_d(teacher k, student) - w_nll log p_S(y) + policy terms`, per token.

    `names`, `divergences` and `coefficients` have one entry per term, computed on `support`; `temperature`
    (tau) applies to the divergences, whose gradient scale the square keeps (Hinton 2015). The weights w are
    given per token, denominators included.
    """

    names: tuple[str, ...]
    divergences: tuple[Divergence, ...]
    coefficients: tuple[float, ...]
    temperature: float = 1.0
    nll: float = 0.0
    policy: Policy | None = None
    support: Support | None = None

    def per_token(
        self,
        teacher_weight_KN: Tensor,
        nll_weight_N: Tensor,
        policy_rows: PolicyRows | None = None,
        term_weight_KDN: Tensor | None = None,
    ) -> Callable[[BlockStats, slice], Tensor]:
        """Return the function that `fused_loss` calls for each block of rows.

        `term_weight_KDN` replaces `teacher_weight_KN` in divergences that have weights of their own.
        """
        scale = self.temperature**2
        weights = [
            scale * coefficient * (teacher_weight_KN if term_weight_KDN is None else term_weight_KDN[:, d])
            for d, coefficient in enumerate(self.coefficients)
        ]
        none = teacher_weight_KN.new_zeros(len(teacher_weight_KN), 0, teacher_weight_KN.shape[1])
        linear = LinearObjective(
            torch.stack(weights, 1) if weights else none, self.nll * nll_weight_N if self.nll else None
        )
        if self.policy is None or policy_rows is None:
            return linear
        policy, known = self.policy, policy_rows

        def loss(stats: BlockStats, rows: slice) -> Tensor:
            weight = teacher_weight_KN[:, rows]
            tokens = policy_tokens(policy, known, rows, stats.logprob_S, stats.logprob_T, weight)
            return linear(stats, rows) + tokens.loss

        return loss

    def mean_over(
        self, mask_N: Tensor, teacher_weights: Sequence[float] = (1.0,), num_tokens: float | None = None
    ) -> Callable[[BlockStats, slice], Tensor]:
        """Return the function that `fused_loss` calls, for the mean over the tokens selected by `mask_N`.

        mask_N           booleans or weights `[N]`; 0 leaves a token out
        teacher_weights  one weight for each target
        num_tokens       the denominator; default: the sum of the mask. With gradient accumulation or several
                         ranks, pass the sum over the whole batch

        Raises ValueError where the mask selects no token and no denominator is given.
        """
        total = float(mask_N.sum()) if num_tokens is None else num_tokens
        if not total > 0:
            raise ValueError("the mask selects no token; leave such a batch out, or pass num_tokens")
        weight_N = mask_N / total
        return self.per_token(torch.stack([weight * weight_N for weight in teacher_weights]), weight_N)

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the rows of `measured`."""
        return self.names or (SAMPLED,)

    def measured(self, stats: BlockStats) -> Tensor:
        """Return `[K, len(measures), n]`: the divergences, or k3 of the sampled token without divergences."""
        if self.names:
            return stats.divergence
        gap = stats.logprob_T - stats.logprob_S
        return (gap.clamp(max=20.0).exp() - gap - 1.0).unsqueeze(1)


def build_objective(
    terms: Mapping[str, tuple[Divergence, float]],
    *,
    nll: float = 0.0,
    temperature: float = 1.0,
    policy: Policy | None = None,
    support: Support | None = None,
) -> DistillationObjective:
    """Build a weighted sum of divergences, each given as name: (divergence, weight).

    Terms of weight 0 are not computed. `nll` weighs the negative log-likelihood of the labels. The result
    has the arguments of `fused_loss`: a function per token (`mean_over`), `divergences`, `temperature` and
    `support`.
    """
    used = [(name, divergence, weight) for name, (divergence, weight) in terms.items() if weight]
    return DistillationObjective(
        names=tuple(name for name, _, _ in used),
        divergences=tuple(divergence for _, divergence, _ in used),
        coefficients=tuple(weight for _, _, weight in used),
        temperature=temperature,
        nll=nll,
        policy=policy,
        support=support,
    )
