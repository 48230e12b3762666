"""`bridge_loss` against dense matrices and autograd in float64, and what must not change its result."""

import math

import bridge_reference as reference
import pytest
import torch

from mergeopd.loss import JSD, ForwardKL, Head, Hidden, ReverseKL, Workspace, fused_loss, heads
from mergeopd.loss.cross_tokenizer import (
    ExactPairs,
    Gold,
    Groups,
    Projected,
    SparseMap,
    Uld,
    bridge_loss,
)
from mergeopd.loss.cross_tokenizer import fused as bridge_module

BRIDGES = {
    "gold": Gold(reference.pairs_of(12)),
    "gold bayesian": Gold(reference.pairs_of(7), beta=0.2, merge="bayesian"),
    "gold weights": Gold(reference.pairs_of(12), beta=0.9, weights=(1.5, 0.3)),
    "gold without pairs": Gold(reference.pairs_of(0), merge="bayesian"),
    "gold without rest of the student": Gold(reference.pairs_of(19)),
    "gold pairs alone": Gold(reference.pairs_of(9), weights=(1.0, 0.0)),
    "uld": Uld(),
    "uld bayesian": Uld("bayesian"),
    "forward": Projected(reference.table_of()),
    "reverse": Projected(reference.table_of(), "reverse"),
    "forward best": Projected(reference.table_of(reach=9), top_k=4),
    "reverse best": Projected(reference.table_of(reach=21), "reverse", top_k=5),
    "more than covered": Projected(reference.table_of(reach=9), top_k=500),
}
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "all": {"bias": True, "scale": 0.7, "softcap": 4.0, "pad": 3},
    "one token per group": {"sizes_S": (1,) * 6, "sizes_T": (1,) * 6, "softcap": 3.0},
}


def run(problem, bridge, **options):
    return bridge_loss(
        problem.hidden,
        problem.head,
        problem.target,
        problem.groups,
        problem.labels_S,
        problem.labels_T,
        bridge,
        problem.weight_G,
        **options,
    )


def same_gradients(loss, expected, problem, rtol=1e-9, atol=1e-11):
    pairs = zip(reference.gradients(loss, problem), reference.gradients(expected, problem), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", BRIDGES)
def test_equals_autograd_on_dense_matrices(name, head, temperature):
    problem = reference.make_problem(**HEADS[head])
    expected, values = reference.naive_loss(problem, BRIDGES[name], temperature)
    loss, stats = run(problem, BRIDGES[name], temperature=temperature, chunk_rows=4)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-11, abs=1e-13)
    torch.testing.assert_close(stats.value, values, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(stats.loss, values * problem.weight_G * temperature**2)
    same_gradients(loss, expected, problem)


@pytest.mark.parametrize("name", BRIDGES)
def test_gradcheck(name):
    problem = reference.make_problem(
        sizes_S=(1, 2), sizes_T=(2, 1), gap_S=1, gap_T=0, bias=True, softcap=4.0, pad=1, d_S=2, d_T=3
    )

    def loss(hidden, weight, bias):
        head = Head(weight, bias, softcap=4.0, num_valid=19)
        return bridge_loss(
            hidden,
            head,
            problem.target,
            problem.groups,
            problem.labels_S,
            problem.labels_T,
            BRIDGES[name],
            problem.weight_G,
        )[0]

    inputs = (problem.hidden, problem.head.weight, problem.head.bias)
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("name", BRIDGES)
def test_statistics_of_the_groups(name):
    problem = reference.make_problem()
    _, stats = run(problem, BRIDGES[name], temperature=1.3)
    log_S = reference.logprobs(problem.hidden, problem.head, 1.3)
    log_T = reference.logprobs(problem.target.hidden, problem.target.head, 1.3)
    for g in range(len(problem.groups)):
        rows = range(
            int(problem.groups.first_S[g]), int(problem.groups.first_S[g]) + int(problem.groups.num_S[g])
        )
        own = sum(log_S[r, problem.labels_S[r]].item() for r in rows)
        assert stats.logprob_S[g].item() == pytest.approx(own)
        rows = range(
            int(problem.groups.first_T[g]), int(problem.groups.first_T[g]) + int(problem.groups.num_T[g])
        )
        other = sum(log_T[r, problem.labels_T[r]].item() for r in rows)
        assert stats.logprob_T[g].item() == pytest.approx(other)
    assert not stats.loss.requires_grad


def probability_rows(*rows):
    """Head and hidden states whose softmax is these rows."""
    logits = torch.tensor(rows, dtype=torch.float64).log()
    return logits, Head(torch.eye(logits.shape[1], dtype=torch.float64))


@pytest.mark.parametrize(
    ("merge", "merged"), [("observed", (0.30, 0.15, 0.05)), ("bayesian", (0.12, 0.30, 0.18))]
)
@pytest.mark.parametrize("longer", ["student", "teacher"])
def test_golden_numbers_of_the_merging(merge, merged, longer):
    """probs[0] = [.6, .3, .1], probs[1] = [.2, .5, .3], tokens [0, 1]: the unit test of GOLD's own code."""
    long_hidden, long_head = probability_rows((0.6, 0.3, 0.1), (0.2, 0.5, 0.3))
    other = (0.25, 0.25, 0.5)
    short_hidden, short_head = probability_rows(other)
    tokens, token = torch.tensor([0, 1]), torch.tensor([2])
    sides = [(long_hidden, long_head, tokens), (short_hidden, short_head, token)]
    groups = reference.groups_of((2,), (1,))
    if longer == "teacher":
        sides.reverse()
        groups = reference.groups_of((1,), (2,))
    (hidden, head, labels_S), (hidden_T, head_T, labels_T) = sides
    everything = ExactPairs(torch.arange(3), torch.arange(3), 3, 3)
    one = torch.ones(1, dtype=torch.float64)
    _, stats = bridge_loss(
        hidden, head, Hidden(hidden_T, head_T), groups, labels_S, labels_T, Gold(everything, merge=merge), one
    )
    jsd = 0.0
    for a, b in zip(merged, other, strict=True):
        mean = 0.5 * (a + b)
        jsd += 0.5 * a * math.log(a / mean) + 0.5 * b * math.log(b / mean)
    assert stats.value.item() == pytest.approx(jsd, abs=1e-14)
    mass = {"student": stats.matched_S, "teacher": stats.matched_T}[longer].item()
    assert mass == pytest.approx({"observed": 0.5, "bayesian": 0.6}[merge])
    _, stats = bridge_loss(
        hidden, head, Hidden(hidden_T, head_T), groups, labels_S, labels_T, Uld(merge), one
    )
    ranked = zip(sorted(merged), sorted(other), strict=True)
    assert stats.value.item() == pytest.approx(sum(abs(a - b) for a, b in ranked), abs=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("kind", ["gold", "forward", "reverse"])
def test_same_vocabulary_and_single_tokens_give_the_plain_divergence(kind, dtype, tolerance):
    problem = reference.make_problem(
        sizes_S=(1,) * 40,
        sizes_T=(1,) * 40,
        vocab_S=29,
        vocab_T=29,
        gap_S=0,
        gap_T=0,
        dtype=dtype,
        spread=2.0,
    )
    shuffled = torch.randperm(29, generator=torch.Generator().manual_seed(5))
    identity = SparseMap(torch.arange(29)[:, None], torch.ones(29, 1), 29)
    bridge, divergence = {
        "gold": (Gold(ExactPairs(shuffled, shuffled, 29, 29), beta=0.3), JSD(0.3)),
        "forward": (Projected(identity, "forward", top_k=29), ForwardKL()),
        "reverse": (Projected(identity, "reverse"), ReverseKL()),
    }[kind]
    weight = problem.weight_G

    def objective(stats, rows):
        return stats.divergence[0, 0] * weight[rows]

    num = 40
    hidden, hidden_T = problem.hidden[:num], problem.target.hidden[:num]
    expected, stats_expected = fused_loss(
        hidden,
        problem.head,
        [Hidden(hidden_T, problem.target.head)],
        problem.labels_S[:num],
        objective,
        divergences=[divergence],
    )
    loss, stats = run(problem, bridge)
    torch.testing.assert_close(stats.value, stats_expected.divergence[0, 0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(stats.logprob_S, stats_expected.logprob_S, rtol=tolerance, atol=tolerance)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    same_gradients(loss, expected, problem, rtol=tolerance * 10, atol=tolerance * 10)


@pytest.mark.parametrize("name", BRIDGES)
def test_chunks_blocks_and_a_used_workspace_change_nothing(name, monkeypatch):
    problem = reference.make_problem()
    expected, _ = run(problem, BRIDGES[name])
    workspace = Workspace()
    for chunk_rows in (3, 5, 64):
        for block_rows in (1, 2, 7):
            monkeypatch.setattr(bridge_module, "rows_in_cache", lambda *_, rows=block_rows: rows)
            monkeypatch.setattr(bridge_module, "_SPARSE_ROWS", block_rows)
            loss, _ = run(problem, BRIDGES[name], chunk_rows=chunk_rows, workspace=workspace)
            assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
            same_gradients(loss, expected, problem, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", BRIDGES)
def test_order_of_groups_changes_nothing(name):
    problem = reference.make_problem()
    expected, stats = run(problem, BRIDGES[name])
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    g = problem.groups
    problem.groups = Groups(g.first_S[order], g.num_S[order], g.first_T[order], g.num_T[order])
    problem.weight_G = problem.weight_G[order]
    loss, turned = run(problem, BRIDGES[name], chunk_rows=5)
    torch.testing.assert_close(turned.value, stats.value[order], rtol=1e-12, atol=1e-14)
    same_gradients(loss, expected, problem, rtol=1e-10, atol=1e-13)


def permuted(problem, order_S, order_T):
    """The same models with their vocabularies in another order: new id i is old id order[i]."""
    head, head_T = problem.head, problem.target.head
    return reference.SimpleNamespace(
        hidden=problem.hidden,
        head=Head(head.weight[order_S]),
        target=Hidden(problem.target.hidden, Head(head_T.weight[order_T])),
        groups=problem.groups,
        labels_S=order_S.argsort()[problem.labels_S],
        labels_T=order_T.argsort()[problem.labels_T],
        weight_G=problem.weight_G,
    )


@pytest.mark.parametrize("kind", ["uld", "gold", "projected"])
def test_order_of_the_vocabularies_changes_nothing(kind):
    problem = reference.make_problem()
    g = torch.Generator().manual_seed(9)
    order_S, order_T = torch.randperm(19, generator=g), torch.randperm(23, generator=g)
    where_S, where_T = order_S.argsort(), order_T.argsort()
    pairs, table = reference.pairs_of(11), reference.table_of()
    before, after = {
        "uld": (Uld(), Uld()),
        "gold": (Gold(pairs), Gold(ExactPairs(where_S[pairs.ids_S], where_T[pairs.ids_T], 19, 23))),
        "projected": (
            Projected(table),
            Projected(SparseMap(where_T[table.ids.clamp(min=0)][order_S], table.weights[order_S], 23)),
        ),
    }[kind]
    expected, _ = run(problem, before)
    other = permuted(problem, order_S, order_T)
    loss, _ = run(other, after)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    same_gradients(loss, expected, problem, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", BRIDGES)
def test_rows_in_no_group_do_not_matter(name):
    problem = reference.make_problem()
    expected, _ = run(problem, BRIDGES[name])
    (dH, _) = reference.gradients(expected, problem)
    used = problem.groups.rows()[0]
    unused = torch.ones(len(dH), dtype=torch.bool).index_fill(0, used, False)
    assert unused.sum() == 3
    assert not dH[unused].any()
    assert dH[used].any(1).all()
    with torch.no_grad():
        problem.hidden[unused] = 1e3
        problem.target.hidden[0] = -1e3
    assert run(problem, BRIDGES[name])[0].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("name", ["gold", "uld", "forward"])
def test_no_groups_keep_the_graph(name):
    problem = reference.make_problem(sizes_S=(), sizes_T=())
    loss, stats = run(problem, BRIDGES[name])
    assert loss.item() == 0.0
    assert stats.value.shape == (0,)
    for gradient in reference.gradients(loss, problem):
        assert not gradient.any()


@pytest.mark.parametrize("name", ["gold", "uld bayesian", "forward", "reverse best"])
def test_merged_probabilities_far_below_float32_stay_finite(name):
    """Groups whose other tokens are all but impossible: a clamp would give them mass, a product 0 * inf."""
    problem = reference.make_problem(sizes_S=(6, 1, 5), sizes_T=(5, 2, 6), spread=14.0, dtype=torch.float32)
    loss, stats = run(problem, BRIDGES[name])
    assert stats.logprob_S.min() < -150
    for gradient in reference.gradients(loss, problem):
        assert torch.isfinite(gradient).all()
    if not isinstance(BRIDGES[name], Projected):  # whose logarithm ends where float32 does
        wide = reference.SimpleNamespace(**vars(problem))
        wide.hidden = problem.hidden.detach().double()
        wide.head = Head(problem.head.weight.detach().double(), num_valid=19)
        wide.target = Hidden(
            problem.target.hidden.double(), Head(problem.target.head.weight.double(), num_valid=23)
        )
        values = run(wide, BRIDGES[name])[1].value.float()
        torch.testing.assert_close(stats.value, values, rtol=1e-3, atol=1e-4)


def test_half_precision_follows_the_models_own_rounding():
    problem = reference.make_problem(dtype=torch.bfloat16)
    wide = reference.SimpleNamespace(**vars(problem))
    wide.hidden = problem.hidden.detach().float().requires_grad_()
    wide.head = Head(problem.head.weight.detach().float().requires_grad_(), num_valid=19)
    wide.target = Hidden(
        problem.target.hidden.float(), Head(problem.target.head.weight.float(), num_valid=23)
    )
    wide.weight_G = problem.weight_G.float()
    for name in ("gold", "forward"):
        loss, _ = run(problem, BRIDGES[name])
        expected, _ = run(wide, BRIDGES[name])
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for found, wanted in zip(
            reference.gradients(loss, problem), reference.gradients(expected, wide), strict=True
        ):
            assert found.dtype == torch.bfloat16
            torch.testing.assert_close(found.float(), wanted, rtol=1e-2, atol=1e-3)


def test_only_required_inputs_get_gradients():
    problem = reference.make_problem()
    expected = reference.gradients(run(problem, BRIDGES["gold"])[0], problem)[0]
    frozen = Head(problem.head.weight.detach(), num_valid=19)
    problem.head = frozen
    loss, _ = run(problem, BRIDGES["gold"])
    (3.0 * loss).backward()
    torch.testing.assert_close(problem.hidden.grad, 3.0 * expected)
    with torch.no_grad():
        loss, _ = run(problem, BRIDGES["gold"])
    assert not loss.requires_grad


def test_never_both_vocabularies_for_all_rows(monkeypatch):
    """The largest buffers belong to a chunk, not to the batch."""
    problem = reference.make_problem(sizes_S=(1,) * 60, sizes_T=(1,) * 60, vocab_S=97, vocab_T=101)
    seen = []
    plain = heads.Projection.take

    def take(self, name, rows):
        seen.append(rows)
        return plain(self, name, rows)

    monkeypatch.setattr(heads.Projection, "take", take)
    workspace = Workspace()
    run(problem, Gold(reference.pairs_of(50, 97, 101)), chunk_rows=8, workspace=workspace)
    assert max(seen) == 8
    assert workspace.num_bytes < 60 * (97 + 101) * 8 * 10


def test_inputs_that_do_not_fit_are_errors():
    problem = reference.make_problem()
    gold = BRIDGES["gold"]
    cases = [
        ({"weight_G": problem.weight_G[1:]}, gold, "one for each group"),
        ({"labels_S": problem.labels_S + 30}, gold, "student's label 0 is"),
        ({"labels_T": problem.labels_T[:-1]}, gold, "teacher's labels must be int64"),
        ({"head": Head(problem.head.weight, vocab_start=19)}, gold, "a bridge needs all ids from 0"),
        ({"head": Head(problem.head.weight[:10])}, Gold(reference.pairs_of(5)), "made for 19 student"),
        ({"target": Hidden(problem.target.hidden[:, :3], problem.target.head)}, gold, "its head needs"),
        ({"groups": reference.groups_of((1, 9, 1, 1, 1, 1, 20), (1,) * 7)}, gold, "at least one row"),
        ({"groups": reference.groups_of((1, 0, 1, 1, 1, 1, 2), (1,) * 7)}, gold, "empty on one side"),
    ]
    for changed, bridge, message in cases:
        other = reference.SimpleNamespace(**{**vars(problem), **changed})
        with pytest.raises(ValueError, match=message):
            run(other, bridge)
    with pytest.raises(ValueError, match="chunk_rows is 2; leave out such long groups"):
        run(problem, gold, chunk_rows=2)
    with pytest.raises(ValueError, match="temperature is 0"):
        run(problem, gold, temperature=0.0)
    shared = Groups(*(torch.tensor(x) for x in ([0, 1], [2, 1], [0, 1], [1, 1])))
    with pytest.raises(ValueError, match="groups 0 and 1 share the student's row 1"):
        shared.check(5, 5)


@pytest.mark.parametrize("name", ["gold", "uld", "forward"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_numbers_that_are_not_finite_are_named(name, side):
    problem = reference.make_problem()
    with torch.no_grad():
        (problem.hidden if side == "student" else problem.target.hidden)[4] = torch.nan
    with pytest.raises(ArithmeticError, match=f"the {side}'s log-probability: not finite at 1 of the groups"):
        run(problem, BRIDGES[name])


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_underflow_has_no_gradient_at_any_weight(direction):
    """`1 / (p_S W)` at the end of float32 times the weight is infinite, and p_S there is 0."""
    hidden = torch.tensor([[0.0, -300.0, -1.0]], requires_grad=True)
    target = Hidden(torch.tensor([[-300.0, 0.0, -300.0]]), Head(torch.eye(3)))
    table = SparseMap(torch.arange(3)[:, None], torch.ones(3, 1), 3)
    label = torch.tensor([1])
    loss, _ = bridge_loss(
        hidden,
        Head(torch.eye(3)),
        target,
        reference.groups_of((1,), (1,)),
        label,
        label,
        Projected(table, direction),
        torch.tensor([1e4]),
    )
    loss.backward()
    assert torch.isfinite(hidden.grad).all()
