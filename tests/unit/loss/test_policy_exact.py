"""Policy terms through the kernel, in exact expectation over the vocabulary: nothing is sampled.

Every state comes once with each token as its label, weighted by the token's probability. What a sampled
gradient is on average is then a sum, to be compared with a closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mergeopd.loss import Head, Hidden, ReverseKL, TokenStats, fused_loss
from mergeopd.loss.objective import DistillationObjective, build_objective
from mergeopd.loss.policy import ClipRatio, Correction, Credit, Policy, PolicyRows, TrustRegion

STATES, VOCAB, WIDTH = 4, 11, 6
PPO = ClipRatio(0.2, 0.28)
WEIGHTS = torch.tensor([0.7, 0.3, 1.1], dtype=torch.float64)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Case:
    """States, a student's head, three teachers with their own widths, a behaviour policy."""

    def __init__(self) -> None:
        self.hidden = randn(0, STATES, WIDTH)
        self.head = randn(1, VOCAB, WIDTH)
        self.teachers = [(randn(2 + k, STATES, 5 + k), randn(9 + k, VOCAB, 5 + k)) for k in range(3)]
        self.log_S = (self.hidden @ self.head.T).log_softmax(1)
        self.log_T = torch.stack([(h @ w.T).log_softmax(1) for h, w in self.teachers])
        self.log_mu = (self.log_S + 0.5 * randn(20, STATES, VOCAB)).log_softmax(1)

    def every_token(
        self,
        objective: DistillationObjective,
        probability: Tensor,
        rows: PolicyRows | None,
        teacher_weight: Tensor = WEIGHTS,
        divergences: Sequence[ReverseKL] = (),
    ) -> tuple[Tensor, Tensor, Tensor, TokenStats]:
        """Loss, dH by state, dW; each (state, token) weighs `probability [STATES, VOCAB]`."""
        hidden, head = self.hidden.clone().requires_grad_(), self.head.clone().requires_grad_()
        num = len(teacher_weight)
        targets = [Hidden(h.repeat_interleave(VOCAB, 0), Head(w)) for h, w in self.teachers[:num]]
        weight = teacher_weight[:, None] * probability.reshape(1, -1)
        loss, stats = fused_loss(
            hidden.repeat_interleave(VOCAB, 0),
            Head(head),
            targets,
            torch.arange(VOCAB).repeat(STATES),
            objective.per_token(weight, torch.zeros(STATES * VOCAB, dtype=torch.float64), rows),
            divergences=divergences,
            chunk_rows=13,
        )
        dH, dW = torch.autograd.grad(loss, [hidden, head])
        return loss.detach(), dH, dW, stats

    def rows(self, outcome: Tensor, behaviour: Tensor | None = None) -> PolicyRows:
        ones = torch.ones(STATES * VOCAB, dtype=torch.float64)
        written = (self.log_S if behaviour is None else behaviour).reshape(-1)
        return PolicyRows(ones, outcome.reshape(-1), written, ones)

    def reverse_kl(self, weights: Tensor = WEIGHTS) -> tuple[Tensor, Tensor]:
        """Closed form: `dz = sum_k w_k p (log p - log q_k - KL_k)` for each state."""
        p = self.log_S.exp()
        gap = self.log_S - self.log_T[: len(weights)]
        kl = (p * gap).sum(-1, keepdim=True)
        dz = (weights[:, None, None] * p * (gap - kl)).sum(0)
        return dz @ self.head, dz.T @ self.hidden

    @property
    def silent(self) -> PolicyRows:
        return self.rows(torch.zeros(STATES, VOCAB, dtype=torch.float64))


def close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-12, atol=1e-13) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("num_teachers", [1, 2, 3])
@pytest.mark.parametrize("clip", [None, PPO])
def test_the_sampled_gradient_is_on_average_that_of_reverse_kl(
    num_teachers: int, clip: ClipRatio | None
) -> None:
    case, weights = Case(), WEIGHTS[:num_teachers]
    sampled = build_objective({}, policy=Policy(sampled=1.0, clip=clip))
    loss, dH, dW, _ = case.every_token(sampled, case.log_S.exp(), case.silent, weights)
    assert close((dH, dW), case.reverse_kl(weights))
    exact = build_objective({"reverse_kl": (ReverseKL(), 1.0)})
    kl, *same, _ = case.every_token(exact, case.log_S.exp(), None, weights, [ReverseKL()])
    assert close((loss, dH, dW), (kl, *same))


def test_a_baseline_changes_tokens_but_not_the_average() -> None:
    """An outcome that is the same for all tokens of a state is a baseline."""
    case = Case()
    sampled = build_objective({}, policy=Policy(sampled=1.0))
    p = case.log_S.exp()
    baseline = p * randn(5, STATES, 1)
    loss, dH, dW, _ = case.every_token(sampled, p, case.rows(baseline))
    assert close((dH, dW), case.reverse_kl())
    plain, *_ = case.every_token(sampled, p, case.silent)
    assert abs(float(loss - plain)) > 0.1


def test_importance_weights_undo_the_behaviour_policy() -> None:
    """Tokens drawn from mu, weighted by pi_old / mu; without the weights the average is another one."""
    case = Case()
    mu = case.log_mu.exp()
    rows = case.rows(torch.zeros_like(mu), case.log_mu)
    for correction in (Correction("truncate"), Correction("mask", 0.0, 1e9), Correction("sequence_mask")):
        policy = build_objective({}, policy=Policy(sampled=1.0, correction=correction))
        _, dH, dW, _ = case.every_token(policy, mu, rows)
        assert close((dH, dW), case.reverse_kl())
    for correction in (Correction("none"), Correction("mask", 0.8, 1.2), Correction("truncate", 0.0, 1.0)):
        policy = build_objective({}, policy=Policy(sampled=1.0, correction=correction))
        _, dH, _, _ = case.every_token(policy, mu, rows)
        assert not torch.allclose(dH, case.reverse_kl()[0], rtol=1e-2)


def test_the_mean_of_k3_is_the_reverse_kl() -> None:
    """k3, and never negative."""
    case = Case()
    sampled = build_objective({}, policy=Policy(sampled=1.0))
    *_, stats = case.every_token(sampled, case.log_S.exp(), case.silent)
    k3 = sampled.measured(stats)[:, 0].reshape(3, STATES, VOCAB)
    p = case.log_S.exp()
    kl = (p * (case.log_S - case.log_T)).sum(-1)
    assert (k3 >= 0).all()
    assert torch.allclose((p * k3).sum(-1), kl, rtol=1e-12)
    golden = torch.tensor([[-0.641977]], dtype=torch.float64)
    one = replace(stats, logprob_S=torch.zeros(1, dtype=torch.float64), logprob_T=golden)
    assert sampled.measured(one).item() == pytest.approx(0.168228, abs=1e-6)


def test_the_policy_term_beside_an_exact_divergence_is_counted_once() -> None:
    """With three teachers: the exact part is weighted by each, the outcome is not."""
    case = Case()
    p = case.log_S.exp()
    outcome = p * randn(6, STATES, VOCAB)
    terms = {"reverse_kl": (ReverseKL(), 1.0)}
    both = case.every_token(
        build_objective(terms, policy=Policy(clip=PPO)), p, case.rows(outcome), divergences=[ReverseKL()]
    )
    exact = case.every_token(build_objective(terms), p, None, divergences=[ReverseKL()])
    alone = case.every_token(build_objective({}, policy=Policy(clip=PPO)), p, case.rows(outcome), WEIGHTS[:0])
    for joint, first, second in zip(both[:3], exact[:3], alone[:3], strict=True):
        assert torch.allclose(joint, first + second, rtol=1e-12, atol=1e-13)
    # The outcome's part in closed form: sum over v of p A_v (p - e_v).
    dz = outcome.sum(1, keepdim=True) * p - outcome
    assert close((alone[1], alone[2]), (dz @ case.head, dz.T @ case.hidden))


POLICIES = {
    "sampled": Policy(sampled=1.0, clip=PPO),
    "all": Policy(0.5, 0.3, ClipRatio(0.2, 0.28, 1.5), Correction("mask", 0.7, 1.4)),
    "trust region": Policy(clip=PPO, anchor=TrustRegion(0.4)),
    "credit": Policy(0.2, None, PPO, Correction("truncate", 0.8, 1.2), Credit(0.5, 0.2)),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
@pytest.mark.parametrize("first", [True, False])
def test_the_gradient_reaches_the_student_alone(policy: Policy, first: bool) -> None:
    """Everything else may ask for a gradient, gets none, and the student's stays what it was."""
    num, g = 40, torch.Generator().manual_seed(4)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    hidden, head, hidden_T, head_T = leaf(num, WIDTH), leaf(VOCAB, WIDTH), leaf(num, 7), leaf(VOCAB, 7)
    labels = torch.randint(VOCAB, (num,), generator=g)
    with torch.no_grad():
        log_S = (hidden @ head.T).log_softmax(1).gather(1, labels[:, None])[:, 0]
        old = log_S + 0.3 * torch.randn(num, generator=g, dtype=torch.float64)
        behaviour = old + 0.3 * torch.randn(num, generator=g, dtype=torch.float64)
    constants = {
        "own_N": torch.ones(num, dtype=torch.float64),
        "outcome_N": leaf(num).detach(),
        "behaviour_N": behaviour,
        "keep_N": torch.ones(num, dtype=torch.float64),
        "old_N": None if first else old,
    }
    weight = torch.rand(1, num, generator=g, dtype=torch.float64)

    def run(with_grad: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        parts = {
            name: None if value is None else value.clone().requires_grad_(with_grad)
            for name, value in constants.items()
        }
        weights = weight.clone().requires_grad_(with_grad)
        teacher = [
            hidden_T.detach().clone().requires_grad_(with_grad),
            head_T.detach().clone().requires_grad_(with_grad),
        ]
        rows = PolicyRows(**parts)  # type: ignore[arg-type]
        objective = build_objective({}, policy=policy)
        loss, _ = fused_loss(
            hidden,
            Head(head),
            [Hidden(teacher[0], Head(teacher[1]))],
            labels,
            objective.per_token(weights, torch.zeros(num, dtype=torch.float64), rows),
            divergences=(),
            chunk_rows=9,
        )
        found = torch.autograd.grad(loss, [hidden, head], retain_graph=True)
        loss.backward()
        others = [value for value in (*parts.values(), weights, *teacher) if value is not None]
        return loss.detach(), list(found), others

    loss, found, others = run(with_grad=True)
    assert all(other.grad is None or not other.grad.any() for other in others)
    plain, expected, _ = run(with_grad=False)
    assert torch.equal(loss, plain)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert any(gradient.any() for gradient in found)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
def test_at_the_first_update_the_ratio_is_one(policy: Policy) -> None:
    """Whether pi_old was measured or is taken from the pass itself, the loss and its gradient are the same."""
    case = Case()
    p = case.log_S.exp()
    rows = case.rows(p * randn(6, STATES, VOCAB), case.log_mu)
    objective = build_objective({}, policy=policy)
    free = case.every_token(objective, p, rows)
    told = case.every_token(objective, p, replace(rows, old_N=case.log_S.reshape(-1)))
    assert close(free[:3], told[:3])
