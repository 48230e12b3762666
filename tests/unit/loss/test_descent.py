"""Descent directions in logit space against autograd on full logits, and on supports against the kernel's gradient."""

import pytest
import torch

from mergeopd.loss import JSD, TVD, ForwardKL, Head, Hidden, ReverseKL, Support, build_objective, fused_loss
from mergeopd.loss.descent import descent_directions

OPTIONS = {
    "plain": {},
    "all": {"bias": True, "scale": 1.7, "softcap": 2.5, "pad_S": 5, "pad_T": 2},
}
TERMS = {
    "reverse": {"reverse_kl": (ReverseKL(), 1.0)},
    "mixed": {"forward": (ForwardKL(), 0.5), "jsd": (JSD(0.3), 2.0), "tvd": (TVD(), 0.25)},
}


def directions(problem, objective, chunk_rows=4):
    student = Hidden(problem.hidden.detach(), problem.head)
    parts = descent_directions(student, problem.targets[0], objective, chunk_rows=chunk_rows)
    return torch.cat([rows.clone() for _, rows in parts])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("terms", TERMS)
def test_minus_the_gradient_in_the_final_logits(reference, options, terms):
    problem, tau = reference.problem(**OPTIONS[options]), 1.5
    objective = build_objective(TERMS[terms], temperature=tau)
    head, target = problem.head, problem.targets[0]
    final = Head(torch.eye(len(head.vocab), dtype=torch.float64))  # logits as hidden states
    logits = (
        reference.logprobs(problem.hidden, head, 1.0).detach().requires_grad_()
    )  # logits, but for a constant
    log_S, log_T = reference.logprobs(logits, final, tau), reference.logprobs(target.hidden, target.head, tau)
    loss = sum(c * tau**2 * reference.divergence(d, log_S, log_T).sum() for d, c in TERMS[terms].values())
    [expected] = torch.autograd.grad(loss, logits)
    actual = directions(problem, objective)
    torch.testing.assert_close(actual, -expected, rtol=0, atol=1e-12)
    assert actual.sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("rest", ["tail", "generalised"])
def test_supports_as_in_training(reference, rest):
    problem = reference.problem()
    objective = build_objective(
        {"r": (ReverseKL(), 1.0), "f": (ForwardKL(), 0.5)}, support=Support(4, "student", rest)
    )
    loss, _ = fused_loss(
        problem.hidden,
        problem.head,
        problem.targets,
        problem.labels,
        objective.mean_over(torch.ones(len(problem.labels)), num_tokens=1.0),
        divergences=objective.divergences,
        support=objective.support,
    )
    [expected] = torch.autograd.grad(loss, problem.hidden)
    torch.testing.assert_close(-directions(problem, objective) @ problem.head.weight.detach(), expected)


def test_an_objective_needs_a_divergence(reference):
    with pytest.raises(ValueError, match="no divergence"):
        directions(reference.problem(), build_objective({}))
