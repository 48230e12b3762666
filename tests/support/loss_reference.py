"""An independent reference: full logits, `log_softmax` and autograd, by the definitions."""

import math
from types import SimpleNamespace

import torch

from mergeopd.loss import (
    JSD,
    TVD,
    AlphaDivergence,
    BlockStats,
    ClippedForwardKL,
    ForwardKL,
    Head,
    Hidden,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
)


def logprobs(hidden, head, temperature):
    """[N, V_true] log-probabilities, as the model's own forward pass makes them."""
    z = hidden @ head.weight.to(hidden.dtype).T
    if head.bias is not None:
        z = z + head.bias
    z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return torch.log_softmax(z[:, : len(head.vocab)] / temperature, dim=1)


def divergence(spec, log_S, log_T):
    p_S, p_T = log_S.exp(), log_T.exp()
    match spec:
        case ForwardKL():
            return (p_T * (log_T - log_S)).sum(1)
        case ReverseKL():
            return (p_S * (log_S - log_T)).sum(1)
        case JSD(beta):
            log_M = (beta * p_T + (1 - beta) * p_S).log()
            return beta * (p_T * (log_T - log_M)).sum(1) + (1 - beta) * (p_S * (log_S - log_M)).sum(1)
        case TVD():
            return 0.5 * (p_S - p_T).abs().sum(1)
        case SkewForwardKL(alpha):
            return (p_T * (log_T - (alpha * p_T + (1 - alpha) * p_S).log())).sum(1)
        case SkewReverseKL(alpha):
            return (p_S * (log_S - (alpha * p_S + (1 - alpha) * p_T).log())).sum(1)
        case AlphaDivergence(alpha):
            return (1 - (p_T**alpha * p_S ** (1 - alpha)).sum(1)) / (alpha * (1 - alpha))
        case ClippedForwardKL(bound):
            return (p_T * (log_T - log_S)).clamp(max=bound).sum(1)
    raise AssertionError(spec)


def entropy(log_p):
    return -(log_p.exp() * log_p).sum(-1)


def overlap(logits_S, logits_T, k, temperature=1.0):
    """Ratio, advantage and both masses of the k likeliest tokens at one position, over sets of ids."""
    p_S = [math.exp(z) for z in torch.log_softmax(logits_S / temperature, 0).tolist()]
    p_T = [math.exp(z) for z in torch.log_softmax(logits_T / temperature, 0).tolist()]
    ranked = [sorted(range(len(p)), key=lambda v, p=p: -p[v])[:k] for p in (p_S, p_T)]
    common = set(ranked[0]) & set(ranked[1])
    mass_S, mass_T = sum(p_S[v] for v in common), sum(p_T[v] for v in common)
    terms = [p_S[v] / mass_S * math.log(p_T[v] / mass_T * mass_S / p_S[v]) for v in common]
    return len(common) / k, sum(terms) / len(terms) if terms else math.nan, mass_S, mass_T


def naive_loss(hidden, head, targets, labels, per_token, *, divergences, temperature=1.0, measure=divergence):
    """What `fused_loss` returns: the loss, with its graph, and the statistics."""
    log_S = logprobs(hidden, head, temperature)
    log_T = [logprobs(t.hidden, t.head, temperature).detach() for t in targets]
    num, labels = len(labels), labels[:, None]
    measured = [measure(spec, log_S, one) for one in log_T for spec in divergences]
    stats = BlockStats(
        divergence=torch.stack(measured).view(len(targets), len(divergences), num)
        if measured
        else torch.zeros(len(targets), len(divergences), num),
        logprob_S=log_S.gather(1, labels)[:, 0],
        logprob_T=torch.stack([one.gather(1, labels)[:, 0] for one in log_T])
        if targets
        else torch.zeros(0, num),
        entropy_S=entropy(log_S).detach(),
        entropy_T=torch.stack([entropy(one) for one in log_T]) if targets else torch.zeros(0, num),
    )
    return per_token(stats, slice(0, num)).sum(), stats


def make_problem(
    *,
    num=13,
    vocab=23,
    d_S=5,
    d_T=(7,),
    pad_S=0,
    pad_T=0,
    bias=False,
    scale=1.0,
    softcap=None,
    dtype=torch.float64,
    seed=0,
    spread=1.5,
):
    """A random student (requires grad), teachers with heads of their own and another width, and labels."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    def head(d, pad, **options):
        weight = randn(vocab + pad, d) * spread
        weight[vocab:] = 1e4  # a padding row that leaked into a softmax would take all of it
        return Head(weight, randn(vocab + pad) if bias else None, num_valid=vocab, **options)

    student = head(d_S, pad_S, scale=scale, softcap=softcap)
    student.weight.requires_grad_()
    if student.bias is not None:
        student.bias.requires_grad_()
    return SimpleNamespace(
        hidden=randn(num, d_S).requires_grad_(),
        head=student,
        targets=[
            Hidden(randn(num, d), head(d, pad_T + k, scale=scale, softcap=softcap)) for k, d in enumerate(d_T)
        ],
        labels=torch.randint(vocab, (num,), generator=g),
        weights=torch.rand(num, generator=g, dtype=torch.float64).to(dtype),
    )


def gradients(loss, problem):
    leaves = [problem.hidden, problem.head.weight]
    if problem.head.bias is not None:
        leaves.append(problem.head.bias)
    return torch.autograd.grad(loss, leaves)
