"""The bridge's parts: sorted distance against a sort, groups against loops, maps against dense matrices."""

import math

import bridge_reference as reference
import pytest
import torch

from mergeopd.loss import Workspace
from mergeopd.loss.cross_tokenizer import ExactPairs, Gold, Groups, Projected, SparseMap, Uld, group_logratio
from mergeopd.loss.cross_tokenizer.groups import portions
from mergeopd.loss.cross_tokenizer.sorted_l1 import sorted_l1


def softmax(*shape, spread=1.0, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(*shape, generator=g, dtype=torch.float64) * spread, 1).to(dtype)


def check_sorted_l1(s, t):
    expected_by = s.double().requires_grad_()
    rows = zip(expected_by, t.double(), strict=True)
    expected = torch.stack([reference.padded_l1(a, b) for a, b in rows])
    (slope,) = torch.autograd.grad(expected.sum(), expected_by)
    value, sign = sorted_l1(s, t, Workspace())
    tolerance = 1e-12 if s.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(value.double(), expected.detach(), rtol=0.0, atol=tolerance)
    return sign.double(), slope


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("widths", [(3000, 3500), (3500, 3000), (700, 700), (1, 40), (40, 1), (1, 1)])
@pytest.mark.parametrize("spreads", [(1.0, 1.0), (2.0, 2.001), (0.01, 3.0), (30.0, 5.0), (1e-4, 1e-4)])
def test_sorted_distance_equals_sorting(spreads, widths, dtype):
    s = softmax(4, widths[0], spread=spreads[0], seed=1, dtype=dtype)
    t = softmax(4, widths[1], spread=spreads[1], seed=2, dtype=dtype)
    sign, slope = check_sorted_l1(s, t)
    # Of equal entries any may have any rank: compare where an entry is alone. Zeros have no slope of their own.
    alone = torch.stack([(row.unsqueeze(0) == row.unsqueeze(1)).sum(0) == 1 for row in s]) & (s > 0)
    torch.testing.assert_close(sign[alone], slope[alone], rtol=0, atol=0)


def test_sorted_distance_where_nothing_can_be_decided_by_counts():
    """Equal sides, sides shuffled, sides that differ in the last bit: every bucket is close."""
    s = softmax(3, 5000, spread=2.0)
    for t in (s.clone(), s[:, torch.randperm(5000)], torch.nextafter(s, torch.zeros(()).double())):
        sign, slope = check_sorted_l1(s, t)
        torch.testing.assert_close(sign, slope, rtol=0, atol=0)
    value, sign = sorted_l1(s, s.clone(), Workspace())
    assert not value.any()
    assert not sign.any()


def test_sorted_distance_with_ties_keeps_the_total_slope():
    """Equal entries share their ranks: their slopes, summed, are those of the sorted function."""
    s = torch.tensor([[0.25, 0.25, 0.25, 0.25, 0.0, 0.0]])
    t = torch.tensor([[0.5, 0.3, 0.2, 0.0]])
    value, sign = sorted_l1(s, t, Workspace())
    assert value.item() == pytest.approx(0.25 + 0.05 + 0.05 + 0.25)
    assert sorted(sign[0, :4].tolist()) == [-1.0, -1.0, 1.0, 1.0]


def test_sorted_distance_of_an_empty_side():
    s = softmax(2, 5)
    value, sign = sorted_l1(s, s[:, :0], Workspace())
    torch.testing.assert_close(value, torch.ones(2).double())
    assert (sign == 1).all()
    value, sign = sorted_l1(s[:, :0], s, Workspace())
    torch.testing.assert_close(value, torch.ones(2).double())
    assert sign.shape == (2, 0)


def test_logratio_of_single_tokens_is_the_sampled_token_term():
    logprob_S, logprob_T = -torch.rand(2, 6, dtype=torch.float64)
    found = group_logratio(logprob_S, logprob_T, reference.groups_of((1,) * 6, (1,) * 6))
    torch.testing.assert_close(found, logprob_T - logprob_S, rtol=0, atol=0)


def test_logratio_of_groups_sums_to_that_of_the_sequence():
    logprob_S, logprob_T = -torch.rand(9, dtype=torch.float64), -torch.rand(7, dtype=torch.float64)
    sizes_S, sizes_T = (2, 1, 4, 2), (1, 3, 1, 2)
    groups = reference.groups_of(sizes_S, sizes_T)
    found = group_logratio(logprob_S, logprob_T, groups)
    firsts = groups.first_S
    assert found[firsts].sum().item() == pytest.approx((logprob_T.sum() - logprob_S.sum()).item(), rel=1e-13)
    for first, size, first_T, size_T in zip(
        firsts.tolist(), sizes_S, groups.first_T.tolist(), sizes_T, strict=True
    ):
        ratio = logprob_T[first_T : first_T + size_T].sum() - logprob_S[first : first + size].sum()
        torch.testing.assert_close(found[first : first + size], ratio.expand(size))


def test_logratio_leaves_out_tokens_without_a_group_and_is_differentiable():
    logprob_S = (-torch.rand(8, dtype=torch.float64)).requires_grad_()
    logprob_T = (-torch.rand(6, dtype=torch.float64)).requires_grad_()
    groups = reference.groups_of((2, 3), (1, 2), gap_S=1, gap_T=2)
    found = group_logratio(logprob_S, logprob_T, groups)
    assert found[[0, 6, 7]].tolist() == [0.0, 0.0, 0.0]
    assert torch.autograd.gradcheck(lambda s, t: group_logratio(s, t, groups), (logprob_S, logprob_T))
    nothing = group_logratio(logprob_S, logprob_T, reference.groups_of((), ()))
    assert not nothing.any()
    nothing.sum().backward()
    assert not logprob_S.grad.any()


def test_logratio_as_advantage_is_the_gradient_of_the_reverse_kl_of_groups():
    """Over all two-token groups of a two-step student: `E[-A grad log p_S] = grad KL(p_S ‖ p_T)`."""
    g = torch.Generator().manual_seed(3)
    z0 = torch.randn(3, generator=g, dtype=torch.float64).requires_grad_()
    z1 = torch.randn(3, 3, generator=g, dtype=torch.float64).requires_grad_()
    log_T = torch.log_softmax(torch.randn(9, generator=g, dtype=torch.float64), 0)
    first, second = torch.log_softmax(z0, 0), torch.log_softmax(z1, 1)
    log_S = (first[:, None] + second).flatten()
    exact = torch.autograd.grad((log_S.exp() * (log_S - log_T)).sum(), (z0, z1), retain_graph=True)
    groups = reference.groups_of((2,), (1,))
    surrogate = 0.0
    for a in range(3):
        for b in range(3):
            own = torch.stack([first[a], second[a, b]])
            advantage = group_logratio(own, log_T[None, 3 * a + b], groups).detach()
            surrogate = surrogate - (own.sum().exp().detach() * advantage * own).sum()
    for found, wanted in zip(torch.autograd.grad(surrogate, (z0, z1)), exact, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_portions_hold_whole_groups():
    num_S, num_T = [1, 2, 5, 1, 1, 1], [1, 1, 1, 4, 1, 9]
    parts = list(portions(num_S, num_T, 5))
    assert [(part.start, part.stop) for part in parts] == [(0, 2), (2, 3), (3, 5), (5, 6)]
    assert list(portions([], [], 5)) == []


def test_products_of_the_map_equal_its_dense_matrix():
    table = reference.table_of(reach=20)
    dense = torch.zeros(19, 23, dtype=torch.float64)
    dense.index_put_(
        (torch.arange(19).repeat_interleave(3), table.ids.clamp(min=0).flatten()),
        table.weights.flatten(),
        accumulate=True,
    )
    assert table.covered.tolist() == (dense.sum(0) > 0).nonzero().squeeze(1).tolist()
    dense = dense[:, table.covered]
    p, d = softmax(4, 19).t().contiguous(), softmax(4, dense.shape[1], seed=4).t().contiguous()
    torch.testing.assert_close(table.by_T.times(p), dense.t() @ p)
    torch.testing.assert_close(table.by_S.times(d), dense @ d)


def test_maps_that_do_not_fit_are_refused():
    ids = torch.arange(4)
    with pytest.raises(ValueError, match="id 2 has two partners"):
        ExactPairs(ids, torch.tensor([0, 2, 2, 3]), 5, 5)
    with pytest.raises(ValueError, match=r"ids_S reach from 0 to 3, the vocabulary is \[0, 3\)"):
        ExactPairs(ids, ids, 3, 5)
    with pytest.raises(ValueError, match="must pair up"):
        ExactPairs(ids, ids[:2], 5, 5)
    with pytest.raises(ValueError, match="must be int64"):
        ExactPairs(ids.int(), ids.int(), 5, 5)
    two = torch.tensor([[0, 1], [1, 0]])
    for weights in ([[0.5, 0.5], [0.9, 0.9]], [[0.5, 0.5], [-0.1, 0.2]], [[0.5, 0.5], [math.nan, 0.1]]):
        with pytest.raises(ValueError, match="weights of student id 1"):
            SparseMap(two, torch.tensor(weights), 5)
    with pytest.raises(ValueError, match=r"reach from 0 to 1, the teacher's vocabulary is \[0, 1\)"):
        SparseMap(two, torch.full((2, 2), 0.5), 1)
    with pytest.raises(ValueError, match="int64"):
        SparseMap(two.float(), torch.full((2, 2), 0.5), 1)


def test_settings_that_do_not_fit_are_refused():
    pairs, table = reference.pairs_of(3), reference.table_of()
    for make, message in (
        (lambda: Gold(pairs, beta=1.0), "beta is 1.0"),
        (lambda: Gold(pairs, merge="mean"), "merge is 'mean'"),
        (lambda: Gold(pairs, weights=(-1.0, 1.0)), "must be finite and not negative"),
        (lambda: Uld("mean"), "merge is 'mean'"),
        (lambda: Projected(table, "both"), "direction is 'both'"),
        (lambda: Projected(table, top_k=0), "top_k is 0"),
        (lambda: Projected(SparseMap(table.ids, 0 * table.weights, 23)), "covers no teacher id"),
        (lambda: Groups(*(torch.zeros(n, dtype=torch.int64) for n in (2, 2, 1, 2))), "Groups.first_T"),
        (lambda: group_logratio(torch.zeros(2, 2), torch.zeros(2), reference.groups_of((), ())), "logprob_S"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
