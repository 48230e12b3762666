"""The public objective: a mean over masked tokens, against autograd on full logits."""

from __future__ import annotations

import pytest
import torch

from mergeopd.loss import ForwardKL, Head, Hidden, ReverseKL, build_objective, fused_loss


def test_mean_over_masked_tokens_equals_autograd() -> None:
    generator = torch.Generator().manual_seed(1)
    num, vocab = 7, 11

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(num, 3).requires_grad_(), normal(vocab, 3).requires_grad_()
    targets = [Hidden(normal(num, d), Head(normal(vocab, d))) for d in (2, 4)]
    labels = torch.arange(num)
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1], dtype=torch.bool)
    terms = {"reverse_kl": (ReverseKL(), 0.7), "forward_kl": (ForwardKL(), 0.3)}
    objective = build_objective(terms, nll=0.2, temperature=2.0)
    shared = {"divergences": objective.divergences, "temperature": 2.0}
    per_token = objective.mean_over(mask, (1.0, 0.5))
    loss, _ = fused_loss(hidden, Head(weight), targets, labels, per_token, **shared)
    loss.backward()

    student = (hidden @ weight.T / 2.0).log_softmax(-1)
    expected = -0.2 * student[labels, labels]
    for share, target in zip((1.0, 0.5), targets, strict=True):
        teacher = (target.hidden @ target.head.weight.T / 2.0).log_softmax(-1)
        reverse = (student.exp() * (student - teacher)).sum(-1)
        forward = (teacher.exp() * (teacher - student)).sum(-1)
        expected = expected + share * 2.0**2 * (0.7 * reverse + 0.3 * forward)
    mean = expected[mask].mean()
    torch.testing.assert_close(loss, mean)
    for tensor, gradient in zip((hidden, weight), torch.autograd.grad(mean, (hidden, weight)), strict=True):
        torch.testing.assert_close(tensor.grad, gradient)

    # A part of a larger batch: the denominator is the whole batch's.
    part, _ = fused_loss(
        hidden, Head(weight), targets, labels, objective.mean_over(mask, (1.0, 0.5), num_tokens=20), **shared
    )
    torch.testing.assert_close(part, loss * 5 / 20)


def test_a_mask_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="the mask selects no token"):
        build_objective({"reverse_kl": (ReverseKL(), 1.0)}).mean_over(torch.zeros(3))
