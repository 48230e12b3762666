"""Top-k supports against their definition, token by token, on full logits with autograd in float64."""

import itertools
from dataclasses import replace

import pytest
import torch

from mergeopd.loss import (
    JSD,
    TVD,
    AlphaDivergence,
    ClippedForwardKL,
    ForwardKL,
    Head,
    Hidden,
    ReverseKL,
    Sampled,
    SkewForwardKL,
    SkewReverseKL,
    Support,
    TopK,
    Workspace,
    fused_loss,
    observe,
    slicing,
)
from mergeopd.loss.support import top_columns

KLS = (ForwardKL(), ReverseKL())
PROPER = (*KLS, JSD(0.3), TVD(), SkewForwardKL(0.1), SkewReverseKL(0.2), AlphaDivergence(0.7))
ALL = (*PROPER, ClippedForwardKL(0.05))
MEASURABLE = {"tail": ALL, "generalised": KLS}
CHOOSERS = ("student", "teacher", "union")
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 2.5},
    "all": {"bias": True, "scale": 1.7, "softcap": 6.0, "pad_S": 5, "pad_T": 2, "d_T": (3, 8)},
}


def members(support, log_S, log_T):
    """The ids of one token's support, as a set."""
    chosen = []
    if support.of != "teacher":
        chosen += log_S.sort(descending=True).indices[: support.k].tolist()
    if support.of != "student":
        chosen += log_T.sort(descending=True).indices[: support.k].tolist()
    return sorted(set(chosen))


def on_support(reference, support):
    """`(divergence, log_S, log_T) -> [N]`, one token at a time."""

    def one(spec, log_S, log_T):
        inside = members(support, log_S, log_T)
        outside = [v for v in range(len(log_S)) if v not in inside]
        S, T = log_S[inside], log_T[inside]
        if support.rest == "generalised":
            first, second = (T, S) if isinstance(spec, ForwardKL) else (S, T)
            return (first.exp() * (first - second) - first.exp() + second.exp()).sum()
        if outside:
            S = torch.cat([S, log_S[outside].logsumexp(0)[None]])
            T = torch.cat([T, log_T[outside].logsumexp(0)[None]])
        return reference.divergence(spec, S[None], T[None])[0]

    def measure(spec, log_S, log_T):
        return torch.stack([one(spec, S, T) for S, T in zip(log_S, log_T, strict=True)])

    return measure


def mixed(problem):
    """Nonlinear in the divergences and the log-probability, with different factors for each divergence."""

    def objective(stats, rows):
        factor = torch.arange(1.0, 1.0 + stats.divergence.shape[1], dtype=torch.float64)[:, None]
        total = (stats.divergence.clamp(max=2.0) ** 2 * factor).sum((0, 1)) * stats.logprob_S.exp()
        return (total + stats.logprob_S**2 * (1.0 + 0.3 * stats.entropy_S)) * problem.weights[rows]

    return objective


def plain(stats, rows):
    return stats.divergence.sum((0, 1))


def run(problem, objective, divergences, support, targets=None, **options):
    return fused_loss(
        problem.hidden,
        problem.head,
        problem.targets if targets is None else targets,
        problem.labels,
        objective,
        divergences=divergences,
        support=support,
        **options,
    )


def observed(problem, k, temperature=1.0, **options):
    return [
        observe(t.hidden, t.head, problem.labels, temperature=temperature, top_k=k, **options)
        for t in problem.targets
    ]


def assert_same(found, wanted, problem, reference, rtol=1e-10, atol=1e-11):
    torch.testing.assert_close(found[0], wanted[0], rtol=rtol, atol=atol)
    for name in ("divergence", "logprob_S", "logprob_T", "entropy_S", "entropy_T"):
        one, other = getattr(found[1], name), getattr(wanted[1], name)
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, check_dtype=False)
    pairs = zip(reference.gradients(found[0], problem), reference.gradients(wanted[0], problem), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("k", [1, 2, 6, 23, 40])
@pytest.mark.parametrize("rest", MEASURABLE)
@pytest.mark.parametrize("of", CHOOSERS)
@pytest.mark.parametrize("option", OPTIONS)
def test_equals_autograd_by_the_definition(reference, option, of, rest, k):
    support = Support(k, of, rest)
    problem = reference.problem(**OPTIONS[option])
    every = MEASURABLE[rest]
    for temperature, divergences in ((1.0, every), *((2.0, (one,)) for one in every)):
        wanted = reference.loss(
            problem.hidden,
            problem.head,
            problem.targets,
            problem.labels,
            mixed(problem),
            divergences=divergences,
            temperature=temperature,
            measure=on_support(reference, support),
        )
        found = run(problem, mixed(problem), divergences, support, temperature=temperature, chunk_rows=5)
        assert_same(found, wanted, problem, reference)


@pytest.mark.parametrize("divergence", ALL, ids=str)
@pytest.mark.parametrize("rest", MEASURABLE)
def test_gradcheck(reference, divergence, rest):
    if divergence not in MEASURABLE[rest]:
        return
    problem = reference.problem(num=3, vocab=6, d_S=2, d_T=(3,), bias=True, softcap=3.0, pad_S=1)

    def loss(hidden, weight, bias):
        head = Head(weight, bias, softcap=3.0, num_valid=6)
        support = Support(2, "union", rest)
        return fused_loss(
            hidden, head, problem.targets, problem.labels, plain, divergences=[divergence], support=support
        )[0]

    assert torch.autograd.gradcheck(loss, (problem.hidden, problem.head.weight, problem.head.bias))


@pytest.mark.parametrize("of", CHOOSERS)
@pytest.mark.parametrize("rest", MEASURABLE)
@pytest.mark.parametrize("k", [23, 24, 1000])
def test_all_ids_are_the_full_divergence(reference, of, rest, k):
    problem = reference.problem(**OPTIONS["all"])
    divergences = MEASURABLE[rest]
    found = run(problem, mixed(problem), divergences, Support(k, of, rest))
    assert_same(found, run(problem, mixed(problem), divergences, None), problem, reference, 1e-12, 1e-13)


@pytest.mark.parametrize("of", CHOOSERS)
def test_nested_supports_do_not_decrease_and_stay_below_the_whole(reference, of):
    problem = reference.problem(num=40, spread=1.0)
    with torch.no_grad():
        full = run(problem, plain, PROPER, None)[1].divergence
        last = torch.zeros_like(full)
        for k in range(1, 24):
            value = run(problem, plain, PROPER, Support(k, of, "tail"))[1].divergence
            assert torch.all(value >= last - 1e-14)
            assert torch.all(value <= full + 1e-14)
            last = value
            general = run(problem, plain, KLS, Support(k, of, "generalised"))[1].divergence
            assert torch.all(general >= 0.0)
            assert torch.all(general <= value[:, :2] + 1e-14)  # the tail's two masses have one more term


@pytest.mark.parametrize("rest", MEASURABLE)
@pytest.mark.parametrize("of", CHOOSERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_teacher_equal_to_student_is_a_fixed_point(reference, dtype, of, rest):
    """Zero and stationary, which the plain truncated reverse KL is not."""
    for spread in (1.5, 20.0):  # 20: next to all the mass on one token
        problem = reference.problem(num=40, vocab=301, dtype=dtype, bias=True, spread=spread)
        target = Hidden(problem.hidden.detach(), problem.head)
        loss, stats = run(problem, plain, MEASURABLE[rest], Support(4, of, rest), [target])
        assert stats.divergence.abs().max() == 0.0
        tiny = 1e-13 if dtype == torch.float64 else 2e-4 if dtype == torch.float32 else 2e-2
        for gradient in reference.gradients(loss, problem):
            assert gradient.abs().max() < tiny


@pytest.mark.parametrize("rest", MEASURABLE)
@pytest.mark.parametrize("of", CHOOSERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logit_gradients_sum_to_zero(reference, dtype, of, rest):
    """Also where the student leaves next to nothing outside the support, and the teacher much."""
    problem = reference.problem(num=30, vocab=50, dtype=dtype, bias=True, spread=4.0, d_T=(7, 4))
    loss, stats = run(problem, plain, MEASURABLE[rest], Support(2, of, rest))
    assert stats.divergence.max() > 5.0
    d_bias = reference.gradients(loss, problem)[2]
    assert abs(d_bias.sum()) < (1e-11 if dtype == torch.float64 else 1e-4) * d_bias.abs().max()


def test_float32_pulls_mass_back_that_the_student_lost(reference):
    """Forward KL where the student's tail mass is far below float32's resolution of 1: no cancellation."""
    wide, narrow = [], []
    for dtype, results in ((torch.float64, wide), (torch.float32, narrow)):
        hidden = torch.tensor([[30.0, 1.0, 0.0, -1.0]], dtype=dtype, requires_grad=True)
        target = Hidden(torch.tensor([[1.0, 2.0, 0.0, 0.5]], dtype=dtype), Head(torch.eye(4, dtype=dtype)))
        loss, stats = fused_loss(
            hidden,
            Head(torch.eye(4, dtype=dtype)),
            [target],
            torch.tensor([0]),
            plain,
            divergences=[ForwardKL()],
            support=Support(1, "student", "tail"),
        )
        loss.backward()
        results += [stats.divergence[0, 0].double(), hidden.grad[0].double()]
    torch.testing.assert_close(narrow, wide, rtol=1e-5, atol=0.0)
    assert wide[1][0] > 0.7 > -0.5 > wide[1][1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rest", MEASURABLE)
@pytest.mark.parametrize("of", CHOOSERS)
def test_far_apart_distributions_stay_finite(of, rest, dtype):
    hidden = torch.eye(4, dtype=dtype).requires_grad_()
    teacher = torch.tensor([[0.0, -1e4, -3e4, 50.0]], dtype=dtype).expand(4, 4) * (2.0 - torch.eye(4))
    head = Head(100.0 * torch.eye(4, dtype=dtype))
    target = Hidden(teacher.to(dtype), Head(torch.eye(4, dtype=dtype)))
    loss, stats = fused_loss(
        hidden,
        head,
        [target],
        torch.arange(4),
        plain,
        divergences=MEASURABLE[rest],
        support=Support(1, of, rest),
    )
    loss.backward()
    assert torch.isfinite(stats.divergence).all()
    assert torch.isfinite(hidden.grad).all()


def test_chunk_and_block_sizes_change_nothing(reference, monkeypatch):
    problem = reference.problem(d_T=(7, 4), bias=True)
    targets = [problem.targets[0], observed(problem, 5)[1]]

    def once(chunk_rows, block_bytes):
        monkeypatch.setattr(slicing, "_BLOCK_BYTES", block_bytes)
        support = Support(5, "teacher", "tail")
        loss, stats = run(problem, mixed(problem), ALL, support, targets, chunk_rows=chunk_rows)
        return [loss, stats.divergence, *reference.gradients(loss, problem)]

    expected = once(1000, 1 << 30)
    for chunk_rows, block_bytes in itertools.product((1, 4, 7, 13), (1, 23 * 8 * 3)):
        torch.testing.assert_close(once(chunk_rows, block_bytes), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rest", MEASURABLE)
def test_ties_take_k_ids(rest):
    """Equal logits: whichever are taken, k of them, and each has the same probability."""
    head = Head(torch.eye(6, dtype=torch.float64))
    hidden = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
    teacher = Hidden(torch.zeros(1, 6, dtype=torch.float64), head)
    p_T = torch.full((6,), 1 / 6, dtype=torch.float64)
    leaned = Hidden(torch.tensor([[1.0] + 5 * [0.0]], dtype=torch.float64), head)
    for k, of in itertools.product((1, 2, 5), CHOOSERS):
        loss, stats = fused_loss(
            hidden, head, [teacher], torch.tensor([0]), plain, divergences=KLS, support=Support(k, of, rest)
        )
        assert torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-15
    # Teacher's top 2 of a tie behind its first: one of five equals.
    q = torch.softmax(leaned.hidden[0], 0)
    _, stats = fused_loss(
        hidden, head, [leaned], torch.tensor([0]), plain, divergences=[ForwardKL()],
        support=Support(2, "teacher", rest),
    )  # fmt: skip
    inside = (q[:2] * (q[:2] / p_T[:2]).log()).sum()
    rest_T, rest_S = q[2:].sum(), p_T[2:].sum()
    tail = rest_T * (rest_T / rest_S).log() if rest == "tail" else p_T[:2].sum() - q[:2].sum()
    assert stats.divergence.item() == pytest.approx((inside + tail).item(), abs=1e-15)


@pytest.mark.parametrize("k", [1, 3, 16, 64])
@pytest.mark.parametrize("width", [40, 2048, 2049, 4127])
def test_search_by_groups_finds_the_largest(width, k):
    matrix = torch.randn(9, width, generator=torch.Generator().manual_seed(k))
    matrix[3] = matrix[3].round()  # many ties
    found = top_columns(matrix, k)
    assert found.shape == (9, min(k, width))
    for row, columns in zip(matrix, found, strict=True):
        assert len(set(columns.tolist())) == len(columns)
        assert torch.equal(row[columns].sort().values, row.sort().values[-len(columns) :])


def test_one_token_vocabulary_and_no_tokens(reference):
    problem = reference.problem(vocab=1)
    loss, stats = run(problem, plain, ALL, Support(3, "union", "tail"))
    assert not stats.divergence.any()
    assert not any(gradient.any() for gradient in reference.gradients(loss, problem))
    problem = reference.problem(num=0)
    for targets in (problem.targets, observed(problem, 3)):
        loss, stats = run(problem, plain, ALL, Support(3, "teacher", "tail"), targets)
        assert loss.item() == 0.0
        assert stats.divergence.shape == (1, len(ALL), 0)
        assert not any(gradient.any() for gradient in reference.gradients(loss, problem))


def test_workspace_grows_by_nothing(reference):
    """A support needs small matrices besides, but no further `[n, V]`."""
    problem = reference.problem(num=64, vocab=4096, dtype=torch.float32)
    sizes = []
    for support in (None, Support(8, "union", "tail")):
        workspace = Workspace()
        run(problem, plain, [ForwardKL()], support, workspace=workspace, chunk_rows=32)
        sizes.append(workspace.num_bytes)
    assert sizes[0] == sizes[1]


# ------------------------------------------------------------------------------------- golden (appendix A)

Z_S, Z_T = [2.0, 1.0, 0.0, -1.0, 0.5], [1.0, 1.5, -0.5, 0.0, -1.0]


def golden(divergence, support):
    head = Head(torch.eye(5, dtype=torch.float64))
    hidden = torch.tensor([Z_S], dtype=torch.float64, requires_grad=True)
    target = Hidden(torch.tensor([Z_T], dtype=torch.float64), head)
    loss, _ = fused_loss(
        hidden, head, [target], torch.tensor([0]), plain, divergences=[divergence], support=support
    )
    loss.backward()
    return loss.item(), hidden.grad[0]


def test_golden_reverse_kl_on_the_students_top_two():
    p_S, p_T = torch.tensor([Z_S, Z_T], dtype=torch.float64).softmax(1)
    generalised, dz = golden(ReverseKL(), Support(2, "student", "generalised"))
    assert generalised == pytest.approx(0.198375, abs=1e-6)
    assert generalised + (p_S[:2] - p_T[:2]).sum().item() == pytest.approx(0.183730, abs=1e-6)  # naive
    g = torch.cat([(p_S / p_T).log()[:2], torch.zeros(3, dtype=torch.float64)])
    torch.testing.assert_close(dz, p_S * (g - (p_S * g).sum()))
    assert golden(ReverseKL(), Support(2, "student", "tail"))[0] == pytest.approx(0.198863, abs=1e-6)


def test_golden_forward_kl_on_the_teachers_top_two():
    """The truncated one and its gradient, by what the generalised one adds: `m_S - m_T`."""
    p_S, p_T = torch.tensor([Z_S, Z_T], dtype=torch.float64).softmax(1)
    inside = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    value, dz = golden(ForwardKL(), Support(2, "teacher", "generalised"))
    assert value - (p_S[:2] - p_T[:2]).sum().item() == pytest.approx(0.228933, abs=1e-6)
    truncated = dz - p_S * (inside - p_S[:2].sum())
    assert truncated.tolist() == pytest.approx([0.145563, -0.325951, 0.059798, 0.021999, 0.098591], abs=1e-6)
    assert p_T[:2].sum().item() == pytest.approx(0.784791, abs=1e-6)


def test_candidates_as_actions_pull_like_the_generalised_kl_over_the_mass_inside():
    """Rethinking OPD and Open-MOPD: reward `-(log p_S - log p_T) pbar_S` for each of the student's top k."""
    log_S = torch.tensor(Z_S, dtype=torch.float64).log_softmax(0).requires_grad_()
    log_T = torch.tensor(Z_T, dtype=torch.float64).log_softmax(0)
    inside = log_S.detach()[:2].exp()
    rewards = (log_T - log_S.detach())[:2] * inside / inside.sum()
    assert rewards.tolist() == pytest.approx([-0.469323, 0.230758], abs=1e-6)
    z = torch.tensor(Z_S, dtype=torch.float64, requires_grad=True)
    (-(rewards * z.log_softmax(0)[:2]).sum()).backward()
    _, dz = golden(ReverseKL(), Support(2, "student", "generalised"))
    torch.testing.assert_close(z.grad, dz / inside.sum())


# ------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("rest", MEASURABLE)
@pytest.mark.parametrize("k", [1, 6, 23, 30])
@pytest.mark.parametrize("option", OPTIONS)
def test_the_students_top_k_equals_hidden_states(reference, option, k, rest):
    problem = reference.problem(**OPTIONS[option])
    support, divergences = Support(k, "student", rest), MEASURABLE[rest]
    with torch.no_grad():
        ids = run(problem, plain, (), None, (), temperature=1.5, chunk_rows=5, top_ids=k)[1].top_ids.long()
    assert ids.shape == (len(problem.labels), min(k, 23))
    whole = [at_ids(top, ids.flip(1)) for top in observed(problem, 23, temperature=1.5)]
    for targets in (whole, [problem.targets[0], *whole[1:]], [whole[0], *problem.targets[1:]]):
        wanted = run(problem, mixed(problem), divergences, support, temperature=1.5)
        again = run(problem, mixed(problem), divergences, support, targets, temperature=1.5, chunk_rows=5)
        assert_same(again, wanted, problem, reference)
    unknown = [replace(target, entropy=target.entropy * torch.nan) for target in whole]
    assert run(problem, plain, divergences, support, unknown, temperature=1.5)[1].entropy_T.isnan().all()
    with pytest.raises(ValueError, match="only the student's top"):
        run(problem, plain, divergences, Support(k, "teacher", rest), whole, temperature=1.5)


def at_ids(whole, ids):
    """A target at other ids, from one with all ids."""
    logprobs = torch.empty_like(whole.logprobs).scatter(1, whole.ids, whole.logprobs)
    others = logprobs.scatter(1, ids, -torch.inf)
    return TopK(ids, logprobs.gather(1, ids), whole.logprob, whole.entropy, others.logsumexp(1), of="student")


@pytest.mark.parametrize("rest", MEASURABLE)
@pytest.mark.parametrize("k", [1, 6, 23, 30])
@pytest.mark.parametrize("option", OPTIONS)
def test_observed_top_k_equals_hidden_states(reference, option, k, rest):
    problem = reference.problem(**OPTIONS[option])
    support, divergences = Support(k, "teacher", rest), MEASURABLE[rest]
    tops = observed(problem, k, temperature=1.5, chunk_rows=4)
    shuffled = [
        TopK(top.ids.flip(1), top.logprobs.flip(1), top.logprob, top.entropy, top.log_tail)
        if i
        else TopK.unpack(top.packed())
        for i, top in enumerate(tops)
    ]
    for targets in (tops, shuffled, [problem.targets[0], *tops[1:]], [tops[0], *problem.targets[1:]]):
        wanted = run(problem, mixed(problem), divergences, support, temperature=1.5)
        found = run(problem, mixed(problem), divergences, support, targets, temperature=1.5, chunk_rows=5)
        assert_same(found, wanted, problem, reference)


@pytest.mark.parametrize("rest", MEASURABLE)
@pytest.mark.parametrize(("vocab", "k"), [(3001, 16), (23, 23)])
def test_observed_top_k_equals_hidden_states_in_float32(reference, vocab, k, rest):
    """Also where there is no tail: what rounding leaves of the teacher's must not pass for one."""
    problem = reference.problem(num=60, vocab=vocab, dtype=torch.float32, spread=1.0)
    support = Support(k, "teacher", rest)
    wanted = run(problem, plain, MEASURABLE[rest], support)
    found = run(problem, plain, MEASURABLE[rest], support, observed(problem, k))
    torch.testing.assert_close(found[1].divergence, wanted[1].divergence, rtol=1e-5, atol=1e-6)
    for one, other in zip(
        reference.gradients(found[0], problem), reference.gradients(wanted[0], problem), strict=True
    ):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
@pytest.mark.parametrize("confidence", [14.0, 25.0, 40.0])
def test_the_tail_of_a_sure_teacher_is_kept(confidence, dtype, rtol):
    """One minus the top two's mass says nothing of a tail of 1e-10; closed form over two tokens and a tail."""
    num_others = 48
    z_T = torch.tensor([[confidence, confidence - 2.0, *[0.0] * num_others]], dtype=torch.float64)
    z_S = torch.tensor([[6.0, 4.0, *[0.0] * num_others]], dtype=torch.float64)

    def categories(z):
        log_p = z.log_softmax(1)[0]
        return torch.cat([log_p[:2], log_p[2:].logsumexp(0, keepdim=True)])

    z_S.requires_grad_()
    log_S, log_T = categories(z_S), categories(z_T)
    expected = (log_S.exp() * (log_S - log_T)).sum()
    (expected_dz,) = torch.autograd.grad(expected, z_S)
    head = Head(torch.eye(50, dtype=dtype))
    hidden = z_S.detach().to(dtype).requires_grad_()
    top = observe(z_T.to(dtype), head, torch.tensor([0]), top_k=2)
    loss, _ = fused_loss(
        hidden, head, [TopK.unpack(top.packed())], torch.tensor([0]), plain,
        divergences=[ReverseKL()], support=Support(2, "teacher", "tail"),
    )  # fmt: skip
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=rtol)
    torch.testing.assert_close(hidden.grad.double(), expected_dz, rtol=rtol, atol=rtol / 100)


def test_observed_numbers_are_those_of_the_definition(reference):
    problem = reference.problem(num=30, **OPTIONS["all"])
    for target in problem.targets:
        log_p = reference.logprobs(target.hidden, target.head, 0.7)
        top = observe(target.hidden, target.head, problem.labels, temperature=0.7, top_k=4, chunk_rows=7)
        sampled = observe(target.hidden, target.head, problem.labels, temperature=0.7, top_k=None)
        assert isinstance(sampled, Sampled)
        for one in (top, sampled):
            torch.testing.assert_close(one.logprob, log_p.gather(1, problem.labels[:, None])[:, 0])
            torch.testing.assert_close(one.entropy, reference.entropy(log_p))
        torch.testing.assert_close(top.logprobs, log_p.gather(1, top.ids))
        others = log_p.scatter(1, top.ids, -torch.inf).logsumexp(1)
        torch.testing.assert_close(top.log_tail, others)
        assert torch.equal(top.ids.sort(1).values, log_p.topk(4).indices.sort(1).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_and_back(dtype):
    g = torch.Generator().manual_seed(0)
    ids = torch.tensor([[0, (1 << 24) - 1], [151935, 7]])
    numbers = torch.randn(2, 5, generator=g, dtype=torch.float64).to(dtype)
    top = TopK(ids, numbers[:, :2], *numbers[:, 2:].T)
    back = TopK.unpack(top.packed())
    assert top.packed().shape == (2, 7)
    for name in ("ids", "logprobs", "logprob", "entropy", "log_tail"):
        assert torch.equal(getattr(back, name), getattr(top, name))
    sampled = Sampled(numbers[:, 2], numbers[:, 3])
    back = Sampled.unpack(sampled.packed())
    assert sampled.packed().shape == (2, 2)
    assert torch.equal(back.logprob, sampled.logprob)
    assert torch.equal(back.entropy, sampled.entropy)
    empty = TopK.unpack(TopK(ids[:0], numbers[:0, :2], *numbers[:0, 2:].T).packed())
    assert empty.ids.shape == (0, 2)


def test_packing_that_loses_precision_is_an_error():
    large = TopK(torch.tensor([[1 << 24]]), torch.zeros(1, 1), *torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"token id 16777216 is not exact in float32, which ends at 2\^24"):
        large.packed()
    with pytest.raises(ValueError, match="bfloat16 cannot hold these numbers exactly"):
        Sampled(torch.zeros(1).bfloat16(), torch.zeros(1).bfloat16()).packed()
    with pytest.raises(ValueError, match=r"must be \[N, 2k \+ 3\], got \[3, 6\]"):
        TopK.unpack(torch.zeros(3, 6))
    with pytest.raises(ValueError, match=r"must be \[N, 2\], got \[3, 4\]"):
        Sampled.unpack(torch.zeros(3, 4))


def test_without_divergences_every_target_will_do(reference):
    """Log-probabilities and entropies, by whatever way they are known."""
    problem = reference.problem(d_T=(3, 5, 7))

    def objective(stats, rows):
        return -(stats.logprob_S * stats.logprob_T.exp().sum(0)) * problem.weights[rows]

    targets = [
        problem.targets[0],
        observed(problem, 3)[1],
        observed(problem, None)[2],
    ]
    assert [type(target) for target in targets] == [Hidden, TopK, Sampled]
    for support in (None, Support(3, "student", "tail")):
        wanted = run(problem, objective, (), None)
        found = run(problem, objective, (), support, targets, chunk_rows=4)
        assert_same(found, wanted, problem, reference)
        assert found[1].divergence.shape == (3, 0, 13)


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"k": 0}, "k is 0, must be an integer of at least 1"),
        ({"k": True}, "k is True"),
        ({"k": 2.0}, "k is 2.0"),
        ({"of": "both"}, "of is 'both', must be one of student, teacher, union"),
        ({"rest": "none"}, "rest is 'none', must be one of tail, generalised"),
    ],
)
def test_misfitting_support(options, text):
    with pytest.raises(ValueError, match=text):
        Support(**{"k": 2, "of": "student", "rest": "tail", **options})


@pytest.mark.parametrize("divergence", [one for one in ALL if one not in KLS], ids=str)
def test_generalised_is_for_the_kls(reference, divergence):
    with pytest.raises(ValueError, match=r"has no generalised form on a top-k support; use rest=\"tail\""):
        run(reference.problem(), plain, [divergence], Support(2, "student", "generalised"))


def test_a_negative_cap_is_refused():
    for bound in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="bound must be at least 0"):
            ClippedForwardKL(bound)


def test_a_sampled_token_gives_no_divergence(reference):
    problem = reference.problem()
    for support in (None, Support(2, "teacher", "tail")):
        with pytest.raises(ValueError, match="target 0: no divergence can be computed from the sampled"):
            run(problem, plain, KLS, support, observed(problem, None))


@pytest.mark.parametrize(
    ("support", "text"),
    [
        (None, r"target 1: divergences over the whole vocabulary need its hidden states.*Support\(k=3, of="),
        (Support(3, "student", "tail"), r'target 1: divergences over a support of="student" need'),
        (Support(3, "union", "tail"), r'target 1: divergences over a support of="union" need'),
        (Support(4, "teacher", "tail"), r"target 1: it has its top 3, the support is the top 4; use Support"),
        (Support(2, "teacher", "tail"), r"its top 3, the support is the top 2; .*have the teacher give 2"),
        (Support(99, "teacher", "tail"), r"the top 99; .*have the teacher give 23"),
    ],
)
def test_divergences_that_a_teachers_top_k_does_not_allow(reference, support, text):
    problem = reference.problem(d_T=(7, 4))
    targets = [problem.targets[0], observed(problem, 3)[1]]
    with pytest.raises(ValueError, match=text):
        run(problem, plain, KLS, support, targets)


def test_broken_top_k(reference):
    problem = reference.problem()
    support = Support(3, "teacher", "tail")

    def call(error, text, **changes):
        top = observed(problem, 3)[0]
        names = ("ids", "logprobs", "logprob", "entropy", "log_tail")
        target = TopK(**{name: changes.get(name, getattr(top, name)) for name in names})
        with pytest.raises(error, match=text):
            run(problem, plain, KLS, support, [target])

    top = observed(problem, 3)[0]
    outside = top.ids.clone()
    outside[2, 1] = 23
    call(ValueError, r"its ids reach from \d+ to 23, the true vocabulary is \[0, 23\)", ids=outside)
    twice = top.ids.clone()
    twice[4, 0] = twice[4, 2]
    call(ValueError, "the top k of token 4 contain an id twice", ids=twice)
    call(ValueError, "a total probability above 1 at token 0", logprobs=top.logprobs + 5.0)
    broken = top.logprobs.clone()
    broken[6, 1] = -torch.inf
    call(ArithmeticError, r"from target 0: not finite at 1 of .*first at 6", logprobs=broken)
    call(ArithmeticError, "target 0: not finite at 13", logprob=top.logprob * torch.nan)
    short = TopK(top.ids[1:], top.logprobs[1:], top.logprob[1:], top.entropy[1:], top.log_tail[1:])
    with pytest.raises(ValueError, match="target 0: it has 12 tokens, the student 13"):
        run(problem, plain, KLS, support, [short])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ids": torch.zeros(4, 2)}, r"TopK.ids must be int64 \[N, k\].*float32 \[4, 2\]"),
        ({"ids": torch.zeros(4, 0, dtype=torch.int64)}, "k at least 1"),
        ({"logprobs": torch.zeros(4, 3)}, r"TopK.logprobs must be \[4, 2\], got \[4, 3\]"),
        ({"entropy": torch.zeros(3)}, r"TopK.entropy must be \[4\], got \[3\]"),
        ({"log_tail": torch.zeros(3)}, r"TopK.log_tail must be \[4\], got \[3\]"),
    ],
)
def test_misfitting_top_k(changes, text):
    fitting = {
        "ids": torch.zeros(4, 2, dtype=torch.int64),
        "logprobs": torch.zeros(4, 2),
        "logprob": torch.zeros(4),
        "entropy": torch.zeros(4),
        "log_tail": torch.zeros(4),
    }
    with pytest.raises(ValueError, match=text):
        TopK(**{**fitting, **changes})
    with pytest.raises(ValueError, match=r"Sampled.entropy must be \[4\], got \[3\]"):
        Sampled(torch.zeros(4), torch.zeros(3))


def test_observe_rejects_wrong_arguments(reference):
    problem = reference.problem()
    target = problem.targets[0]
    with pytest.raises(ValueError, match="top_k is 0, must be at least 1"):
        observe(target.hidden, target.head, problem.labels, top_k=0)
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        observe(target.hidden, target.head, problem.labels, temperature=0.0)
    with pytest.raises(ValueError, match=r"labels_N\[0\] = 99 is not in the true vocabulary"):
        observe(target.hidden, target.head, problem.labels * 0 + 99)
    target.hidden[3, 0] = torch.nan
    with pytest.raises(ArithmeticError, match=r"the logits: not finite at 1 of .*first at 3"):
        observe(target.hidden, target.head, problem.labels, top_k=2)
