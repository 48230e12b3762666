"""The bridges by their definitions: dense matrices, loops over groups, autograd; slow and plain."""

from types import SimpleNamespace

import torch
from loss_reference import logprobs

from mergeopd.loss import Head, Hidden
from mergeopd.loss.cross_tokenizer import ExactPairs, Gold, Groups, Projected, SparseMap, Uld


def merged(log_p, labels, strategy):
    """One group's rows `[m, V]` and tokens -> probabilities `[V]` by the products of methods 10.1."""
    m = len(labels)
    base, others = (0, range(1, m)) if strategy == "observed" else (m - 1, range(m - 1))
    q = log_p[base].exp()
    for k in others:
        q = q * log_p[k, labels[k]].exp()
    return q


def padded_l1(s, t):
    size = max(len(s), len(t))
    s, t = (torch.cat([x.sort(descending=True).values, x.new_zeros(size - len(x))]) for x in (s, t))
    return (s - t).abs().sum()


def value(bridge, log_S, log_T, labels_S, labels_T):
    """One group's measure, from its rows' log-probabilities."""
    match bridge:
        case Gold(pairs=pairs, beta=beta, merge=merge, weights=weights):
            q_S, q_T = merged(log_S, labels_S, merge), merged(log_T, labels_T, merge)
            share = len(pairs.ids_T) / len(q_T)
            w_pairs, w_rest = (share, 1 - share) if weights is None else weights
            a, b = q_S[pairs.ids_S], q_T[pairs.ids_T]
            mean = beta * b + (1 - beta) * a
            jsd = (beta * b * (b / mean).log() + (1 - beta) * a * (a / mean).log()).sum()
            is_rest_S = torch.ones(len(q_S), dtype=torch.bool)
            is_rest_S[pairs.ids_S] = False
            is_rest_T = torch.ones(len(q_T), dtype=torch.bool)
            is_rest_T[pairs.ids_T] = False
            return w_pairs * jsd + w_rest * padded_l1(q_S[is_rest_S], q_T[is_rest_T])
        case Uld(merge=merge):
            return padded_l1(merged(log_S, labels_S, merge), merged(log_T, labels_T, merge))
        case Projected(table=table, direction=direction, top_k=top_k):
            dense = torch.zeros(log_S.shape[1], log_T.shape[1], dtype=log_S.dtype)
            for v in range(len(dense)):
                for t, w in zip(table.ids[v].tolist(), table.weights[v].tolist(), strict=True):
                    if w > 0:
                        dense[v, t] += w
            covered = (dense.sum(0) > 0).nonzero().squeeze(1)
            log_a = (log_S.exp() @ dense)[:, covered].log().mean(0)
            log_b = log_T[:, covered].mean(0)
            if top_k is not None:
                best = log_b.topk(min(top_k, len(log_b))).indices
                log_a, log_b = log_a[best], log_b[best]
            a, b = log_a.exp(), log_b.exp()
            if direction == "forward":
                return (b * (log_b - log_a) - b + a).sum()
            return (a * (log_a - log_b) - a + b).sum()
    raise AssertionError(bridge)


def naive_loss(problem, bridge, temperature=1.0, hidden=None, weight=None, bias=None):
    """Loss with its graph, and the values `[G]`."""
    head = problem.head
    if weight is not None:
        head = Head(weight, bias, head.scale, head.softcap, head.num_valid)
    log_S = logprobs(problem.hidden if hidden is None else hidden, head, temperature)
    log_T = logprobs(problem.target.hidden, problem.target.head, temperature).detach()
    groups = problem.groups
    values = []
    for g in range(len(groups)):
        rows_S = slice(int(groups.first_S[g]), int(groups.first_S[g] + groups.num_S[g]))
        rows_T = slice(int(groups.first_T[g]), int(groups.first_T[g] + groups.num_T[g]))
        values.append(
            value(bridge, log_S[rows_S], log_T[rows_T], problem.labels_S[rows_S], problem.labels_T[rows_T])
        )
    values = torch.stack(values)
    return (values * problem.weight_G).sum() * temperature**2, values.detach()


def groups_of(sizes_S, sizes_T, gap_S=0, gap_T=0):
    """Consecutive groups of these sizes, after some rows that belong to none."""

    def firsts(sizes, gap):
        return [gap + sum(sizes[:g]) for g in range(len(sizes))]

    values = (firsts(sizes_S, gap_S), sizes_S, firsts(sizes_T, gap_T), sizes_T)
    return Groups(*(torch.tensor(list(one), dtype=torch.int64) for one in values))


def make_problem(
    *,
    sizes_S=(1, 2, 1, 1, 3, 1, 2),
    sizes_T=(1, 1, 1, 3, 2, 1, 2),
    gap_S=2,
    gap_T=1,
    vocab_S=19,
    vocab_T=23,
    d_S=5,
    d_T=7,
    pad=0,
    bias=False,
    scale=1.0,
    softcap=None,
    dtype=torch.float64,
    seed=0,
    spread=1.0,
):
    """Random models with vocabularies of their own, aligned groups, rows in no group around them."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    def head(vocab, d):
        weight = randn(vocab + pad, d) * spread
        weight[vocab:] = 1e4
        return Head(weight, randn(vocab + pad) if bias else None, scale, softcap, vocab)

    num_S, num_T = gap_S + sum(sizes_S) + 1, gap_T + sum(sizes_T) + 2
    student = head(vocab_S, d_S)
    student.weight.requires_grad_()
    if student.bias is not None:
        student.bias.requires_grad_()
    return SimpleNamespace(
        hidden=randn(num_S, d_S).requires_grad_(),
        head=student,
        target=Hidden(randn(num_T, d_T), head(vocab_T, d_T)),
        groups=groups_of(sizes_S, sizes_T, gap_S, gap_T),
        labels_S=torch.randint(vocab_S, (num_S,), generator=g),
        labels_T=torch.randint(vocab_T, (num_T,), generator=g),
        weight_G=torch.rand(len(sizes_S), generator=g, dtype=torch.float64).to(dtype),
    )


def pairs_of(num, vocab_S=19, vocab_T=23, seed=1):
    g = torch.Generator().manual_seed(seed)
    ids_S, ids_T = torch.randperm(vocab_S, generator=g)[:num], torch.randperm(vocab_T, generator=g)[:num]
    return ExactPairs(ids_S, ids_T, vocab_S, vocab_T)


def table_of(vocab_S=19, vocab_T=23, k=3, seed=2, reach=None):
    """Some rows exact, some spread, some with a lack of mass, one that leads nowhere, an id twice in a row."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(reach or vocab_T, (vocab_S, k), generator=g)
    weights = torch.rand(vocab_S, k, generator=g, dtype=torch.float64)
    weights = weights / weights.sum(1, keepdim=True)
    weights[::3] = torch.eye(1, k, dtype=torch.float64)
    weights[4] = 0.0
    ids[4] = -1
    weights[5] *= 0.4
    ids[7, 1] = ids[7, 0]
    return SparseMap(ids, weights, vocab_T)


def gradients(loss, problem):
    leaves = [problem.hidden, problem.head.weight]
    if problem.head.bias is not None:
        leaves.append(problem.head.bias)
    return torch.autograd.grad(loss, leaves, retain_graph=True)
