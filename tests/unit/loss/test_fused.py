"""`fused_loss` against full logits and autograd in float64, and what must not change its result."""

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
    SkewForwardKL,
    SkewReverseKL,
    Workspace,
    fused_loss,
    heads,
    slicing,
)

KLS = (ForwardKL(), ReverseKL())
ALL = (
    *KLS,
    JSD(0.3),
    TVD(),
    SkewForwardKL(0.1),
    SkewReverseKL(0.2),
    AlphaDivergence(0.7),
    ClippedForwardKL(0.05),
)


def linear(problem):
    return lambda stats, rows: stats.divergence.sum((0, 1)) * problem.weights[rows]


def nll(problem):
    return lambda stats, rows: -stats.logprob_S * problem.weights[rows]


def mixed(problem, entropy_weight=0.3):
    """Nonlinear in both, with a term that mixes them: nothing a closed form could have assumed.

    Entropies are constants, which finite differences do not know: there their weight must be 0.
    """

    def objective(stats, rows):
        total = (stats.divergence.clamp(max=2.0) ** 2).sum((0, 1)) * stats.logprob_S.exp()
        return (total + stats.logprob_S**2 * (1.0 + entropy_weight * stats.entropy_S)) * problem.weights[rows]

    return objective


OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.4},
    "softcap": {"softcap": 2.5},
    "padding": {"pad_S": 3, "pad_T": 6},
    "two teachers": {"d_T": (7, 4)},
    "all": {"bias": True, "scale": 1.7, "softcap": 6.0, "pad_S": 5, "pad_T": 2, "d_T": (3, 8)},
}


def compare(reference, problem, objective, divergences, temperature, **options):
    args = (problem.hidden, problem.head, problem.targets, problem.labels, objective(problem))
    expected, stats_expected = reference.loss(*args, divergences=divergences, temperature=temperature)
    loss, stats = fused_loss(*args, divergences=divergences, temperature=temperature, **options)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-11, abs=1e-12)
    for name in ("divergence", "logprob_S", "logprob_T", "entropy_S", "entropy_T"):
        torch.testing.assert_close(
            getattr(stats, name), getattr(stats_expected, name), rtol=1e-10, atol=1e-11, check_dtype=False
        )
    pairs = zip(reference.gradients(loss, problem), reference.gradients(expected, problem), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("divergences", [(one,) for one in ALL] + [ALL, (ReverseKL(), ForwardKL())], ids=str)
@pytest.mark.parametrize("objective", [linear, mixed])
@pytest.mark.parametrize("option", OPTIONS)
def test_equals_autograd_on_full_logits(reference, option, objective, divergences):
    for temperature in (1.0, 2.0):
        compare(
            reference, reference.problem(**OPTIONS[option]), objective, divergences, temperature, chunk_rows=5
        )


@pytest.mark.parametrize("option", OPTIONS)
def test_negative_log_likelihood_without_teachers(reference, option):
    problem = reference.problem(**{**OPTIONS[option], "d_T": ()})
    compare(reference, problem, nll, (), 0.7)
    compare(reference, problem, nll, (ReverseKL(),), 0.7)


def test_entropy_and_logprobs_without_divergences(reference):
    compare(reference, reference.problem(d_T=(3, 3)), nll, (), 1.0)


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_gradcheck(reference, divergence):
    problem = reference.problem(num=3, vocab=6, d_S=2, d_T=(3,), bias=True, softcap=3.0, pad_S=1)

    def loss(hidden, weight, bias):
        head = Head(weight, bias, softcap=3.0, num_valid=6)
        return fused_loss(
            hidden,
            head,
            problem.targets,
            problem.labels,
            mixed(problem, entropy_weight=0.0),
            divergences=[divergence],
            chunk_rows=2,
        )[0]

    assert torch.autograd.gradcheck(loss, (problem.hidden, problem.head.weight, problem.head.bias))


def test_chunk_and_block_sizes_change_nothing(reference, monkeypatch):
    problem = reference.problem(d_T=(7, 4), bias=True)

    def run(chunk_rows, block_bytes):
        monkeypatch.setattr(slicing, "_BLOCK_BYTES", block_bytes)
        loss, stats = fused_loss(
            problem.hidden,
            problem.head,
            problem.targets,
            problem.labels,
            mixed(problem),
            divergences=ALL,
            chunk_rows=chunk_rows,
        )
        return [loss, stats.divergence, *reference.gradients(loss, problem)]

    expected = run(1000, 1 << 30)
    for chunk_rows, block_bytes in itertools.product((1, 4, 7, 13), (1, 23 * 8 * 3)):
        torch.testing.assert_close(run(chunk_rows, block_bytes), expected, rtol=1e-12, atol=1e-13)


def test_rows_tell_the_objective_which_tokens_it_sees(reference):
    problem, seen = reference.problem(), []

    def objective(stats, rows):
        seen.extend(range(rows.start, rows.stop))
        assert stats.logprob_S.shape == problem.labels[rows].shape
        return stats.divergence[0, 0]

    fused_loss(
        problem.hidden,
        problem.head,
        problem.targets,
        problem.labels,
        objective,
        divergences=[ALL[0]],
        chunk_rows=4,
    )
    assert seen == list(range(13))


def test_each_width_of_padding_gives_the_same(reference):
    """Heads padded to different multiples: the same true vocabulary, hence the same loss and gradient."""
    results = []
    for pad_S, pad_T in ((0, 0), (9, 0), (0, 9), (4, 41)):
        problem = reference.problem(bias=False)
        head = Head(torch.cat([problem.head.weight, torch.full((pad_S, 5), torch.nan)]), num_valid=23)
        target = problem.targets[0]
        weight_T = torch.cat([target.head.weight, torch.full((pad_T, 7), torch.nan)])
        loss, _ = fused_loss(
            problem.hidden,
            head,
            [Hidden(target.hidden, Head(weight_T, num_valid=23))],
            problem.labels,
            linear(problem),
            divergences=ALL,
        )
        results.append([loss, *reference.gradients(loss, problem)])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_teacher_equal_to_student_is_a_fixed_point(reference, divergence, dtype):
    problem = reference.problem(num=40, vocab=301, dtype=dtype, bias=True, softcap=20.0)
    target = Hidden(problem.hidden.detach(), problem.head)
    loss, stats = fused_loss(
        problem.hidden, problem.head, [target], problem.labels, linear(problem), divergences=[divergence]
    )
    assert stats.divergence.abs().max() == 0.0
    tiny = 1e-14 if dtype == torch.float64 else 1e-6
    for gradient in reference.gradients(loss, problem):
        assert gradient.abs().max() < tiny


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_constants_added_to_logits_change_nothing(reference, divergence):
    problem = reference.problem(bias=True)

    def run(shift_S, shift_T):
        head = Head(problem.head.weight, problem.head.bias + shift_S, num_valid=23)
        target = problem.targets[0]
        head_T = Head(target.head.weight, target.head.bias + shift_T, num_valid=23)
        loss, _ = fused_loss(
            problem.hidden,
            head,
            [Hidden(target.hidden, head_T)],
            problem.labels,
            linear(problem),
            divergences=[divergence],
        )
        return [loss, *reference.gradients(loss, problem)]

    torch.testing.assert_close(run(300.0, -1000.0), run(0.0, 0.0), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_float32_stays_near_float64(reference, divergence):
    exact = reference.problem(num=64, vocab=1021, d_S=24, d_T=(16,), spread=0.8)
    single = reference.problem(num=64, vocab=1021, d_S=24, d_T=(16,), spread=0.8, dtype=torch.float32)
    results = []
    for problem in (exact, single):
        loss, stats = fused_loss(
            problem.hidden,
            problem.head,
            problem.targets,
            problem.labels,
            linear(problem),
            divergences=[divergence],
        )
        results.append(
            [loss.detach(), stats.divergence, stats.entropy_S, *reference.gradients(loss, problem)]
        )
    for wanted, found in zip(*results, strict=True):
        assert found.dtype == torch.float32
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_far_apart_distributions_stay_finite(divergence):
    """A teacher that all but excludes tokens: thousands of nats, but no inf * 0."""
    hidden = torch.eye(4).requires_grad_()
    teacher = torch.tensor([[0.0, -1e4, -3e4, 50.0]]).expand(4, 4) * torch.eye(4).neg().add(2.0)
    loss, stats = fused_loss(
        hidden,
        Head(100.0 * torch.eye(4)),
        [Hidden(teacher, Head(torch.eye(4)))],
        torch.arange(4),
        lambda stats, rows: stats.divergence[0, 0],
        divergences=[divergence],
    )
    loss.backward()
    assert torch.isfinite(stats.divergence).all()
    assert torch.isfinite(hidden.grad).all()


def test_bfloat16_hidden_with_float32_master(reference):
    """The head rounded to bfloat16, float32 logits and accumulation, gradients in their inputs' dtypes."""
    problem = reference.problem(
        num=32, vocab=5003, d_S=16, d_T=(8,), dtype=torch.bfloat16, spread=0.5, pad_S=9
    )
    master = problem.head.weight.detach().float()
    master[:5003] += 1e-3 * torch.randn(5003, 16, generator=torch.Generator().manual_seed(1))
    master.requires_grad_()
    head = Head(master, num_valid=5003)
    weights = problem.weights.double()
    objective = lambda stats, rows: stats.divergence.sum((0, 1)) * weights[rows].to(stats.logprob_S.dtype)  # noqa: E731
    loss, stats = fused_loss(
        problem.hidden, head, problem.targets, problem.labels, objective, divergences=ALL[:2], chunk_rows=10
    )
    loss.backward()
    wide_hidden = problem.hidden.detach().double().requires_grad_()
    wide_weight = master.detach().bfloat16().double().requires_grad_()
    teacher = problem.targets[0]
    wide_target = Hidden(teacher.hidden.double(), Head(teacher.head.weight.double(), num_valid=5003))
    expected, stats_expected = reference.loss(
        wide_hidden,
        Head(wide_weight, num_valid=5003),
        [wide_target],
        problem.labels,
        objective,
        divergences=ALL[:2],
    )
    expected.backward()
    assert stats.divergence.dtype == torch.float32
    torch.testing.assert_close(stats.divergence, stats_expected.divergence.float(), rtol=1e-5, atol=1e-6)
    assert problem.hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(problem.hidden.grad.double(), wide_hidden.grad, rtol=2**-8, atol=1e-6)
    assert master.grad.dtype == torch.float32
    torch.testing.assert_close(master.grad.double(), wide_weight.grad, rtol=1e-4, atol=1e-6)
    assert not master.grad[5003:].any()


def test_native_half_products(reference, monkeypatch):
    """The path of a GPU, with its product emulated: halves in, float32 out, dz rounded to the halves' dtype."""
    problem = reference.problem(num=32, vocab=5003, d_S=16, d_T=(8,), dtype=torch.bfloat16, spread=0.5)

    def run():
        loss, stats = fused_loss(
            problem.hidden,
            problem.head,
            problem.targets,
            problem.labels,
            linear(problem),
            divergences=ALL,
            chunk_rows=10,
        )
        return loss, stats, reference.gradients(loss, problem)

    loss, stats, gradients = run()
    plain_mm, kinds = torch.mm, set()

    def mm(a, b, *, out_dtype=None, **options):
        if out_dtype is None:
            return plain_mm(a, b, **options)
        kinds.add((a.dtype, b.dtype, out_dtype))
        return plain_mm(a.float(), b.float(), **options)

    monkeypatch.setattr(heads, "_multiplies_halves", lambda device: True)
    plain_addmm = torch.addmm

    def addmm(total, a, b, *, out_dtype, out):
        kinds.add((a.dtype, b.dtype, out_dtype))
        return plain_addmm(total, a.float(), b.float(), out=out)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    native_loss, native_stats, native_gradients = run()
    assert kinds == {(torch.bfloat16, torch.bfloat16, torch.float32)}
    torch.testing.assert_close(native_loss, loss, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(native_stats.divergence, stats.divergence, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(native_gradients, gradients, strict=True):
        assert (found - wanted).float().abs().max() < 0.02 * wanted.float().abs().max()


def test_teacher_in_another_dtype(reference):
    problem = reference.problem(dtype=torch.float32)
    teacher = problem.targets[0]
    exact = Hidden(
        teacher.hidden.bfloat16().float(), Head(teacher.head.weight.bfloat16().float(), num_valid=23)
    )
    rounded = Hidden(teacher.hidden.bfloat16(), Head(teacher.head.weight, num_valid=23))
    losses = [
        fused_loss(problem.hidden, problem.head, [target], problem.labels, linear(problem), divergences=ALL)[
            0
        ]
        for target in (exact, rounded)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0.0)


def test_no_tokens_keep_the_graph(reference):
    problem = reference.problem(num=0, bias=True)
    loss, stats = fused_loss(
        problem.hidden, problem.head, problem.targets, problem.labels, linear(problem), divergences=ALL
    )
    assert loss.item() == 0.0
    assert stats.divergence.shape == (1, len(ALL), 0)
    assert all(not gradient.any() for gradient in reference.gradients(loss, problem))


def test_zero_weights_give_zero_gradients(reference):
    problem = reference.problem()
    for objective in (
        lambda s, r: 0.0 * s.divergence.sum((0, 1)),
        lambda s, r: torch.zeros_like(s.entropy_S),
    ):
        loss, _ = fused_loss(
            problem.hidden, problem.head, problem.targets, problem.labels, objective, divergences=ALL
        )
        assert all(not gradient.any() for gradient in reference.gradients(loss, problem))


def test_only_required_gradients_are_computed(reference, monkeypatch):
    problem, calls = reference.problem(), []
    for name in ("grad_hidden", "grad_weight"):
        original = getattr(heads.Projection, name)

        def spy(self, *args, _original=original, _name=name, **kwargs):
            calls.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(heads.Projection, name, spy)

    def run(hidden, weight):
        calls.clear()
        head = Head(weight, num_valid=23)
        return fused_loss(hidden, head, problem.targets, problem.labels, linear(problem), divergences=ALL)[0]

    frozen_hidden, frozen_weight = problem.hidden.detach(), problem.head.weight.detach()
    assert not run(frozen_hidden, frozen_weight).requires_grad
    assert calls == []
    run(problem.hidden, frozen_weight)
    assert calls == ["grad_hidden"]
    run(frozen_hidden, problem.head.weight)
    assert calls == ["grad_weight"]
    with torch.no_grad():
        assert not run(problem.hidden, problem.head.weight).requires_grad
    assert calls == []


def test_gradients_reach_nothing_else(reference):
    """Teachers, and the statistics that are returned, are constants."""
    problem = reference.problem()
    target = problem.targets[0]
    target.hidden.requires_grad_()
    target.head.weight.requires_grad_()
    loss, stats = fused_loss(
        problem.hidden, problem.head, problem.targets, problem.labels, mixed(problem), divergences=ALL
    )
    loss.backward()
    assert target.hidden.grad is None
    assert target.head.weight.grad is None
    assert not any(tensor.requires_grad for tensor in vars(stats).values() if tensor is not None)


def test_backward_scales_and_accumulates(reference):
    problem = reference.problem()

    def run():
        return fused_loss(
            problem.hidden, problem.head, problem.targets, problem.labels, linear(problem), divergences=ALL
        )[0]

    plain = reference.gradients(run(), problem)
    (run() * 3.0 + run()).backward()
    torch.testing.assert_close(problem.hidden.grad, 4.0 * plain[0])
    torch.testing.assert_close(problem.head.weight.grad, 4.0 * plain[1])


@pytest.mark.parametrize("pad", [0, 3])
def test_the_weights_gradient_can_be_summed_elsewhere(reference, pad):
    """In float32 over calls, with whatever loss is made of them; the weight itself gets none."""
    problem = reference.problem(dtype=torch.bfloat16, pad_S=pad, bias=True)

    def loss_with(head):
        arguments = (problem.hidden, head, problem.targets, problem.labels, linear(problem))
        return fused_loss(*arguments, divergences=[ReverseKL()], chunk_rows=5)[0]

    weight = problem.head.weight.detach().float().requires_grad_()
    (2.0 * loss_with(replace(problem.head, weight=weight))).backward()
    expected = weight.grad
    assert not torch.equal(expected, expected.bfloat16().float())
    total = torch.ones_like(expected)
    for _ in range(2):
        loss_with(replace(problem.head, weight_grad=total)).backward()
    torch.testing.assert_close(total, 1.0 + expected, rtol=1e-6, atol=1e-6)
    assert problem.head.weight.grad is None
    assert problem.head.bias.grad is not None
    with pytest.raises(ValueError, match=r"weight_grad must be \[\d+, 5\] like the weight"):
        replace(problem.head, weight_grad=total[1:])


def test_workspace_is_bounded_by_chunk_and_vocabulary(reference):
    vocab, chunk_rows = 4096, 32
    sizes = []
    for num in (64, 256):
        problem, workspace = reference.problem(num=num, vocab=vocab, dtype=torch.float32), Workspace()
        fused_loss(
            problem.hidden,
            problem.head,
            problem.targets,
            problem.labels,
            linear(problem),
            divergences=[ReverseKL()],
            chunk_rows=chunk_rows,
            workspace=workspace,
        )
        sizes.append(workspace.num_bytes)
    assert (
        sizes[0] == sizes[1] == 4 * vocab * chunk_rows * (2 + 1)
    )  # logits, and masses of a block that is a chunk; reverse KL keeps the student's alone


def test_workspace_serves_changing_problems(reference):
    workspace = Workspace()
    for num, vocab, dtype in ((9, 40, torch.float32), (3, 11, torch.float64), (30, 70, torch.float32)):
        problem = reference.problem(num=num, vocab=vocab, dtype=dtype)
        args = (problem.hidden, problem.head, problem.targets, problem.labels, linear(problem))
        fresh = fused_loss(*args, divergences=ALL, chunk_rows=7)
        reused = fused_loss(*args, divergences=ALL, chunk_rows=7, workspace=workspace)
        torch.testing.assert_close(reused[0], fresh[0], rtol=0.0, atol=0.0)
        for one, other in zip(
            reference.gradients(reused[0], problem), reference.gradients(fresh[0], problem), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


# -------------------------------------------------------------------------------------------- bad input


def call(problem, objective=None, **changes):
    args = {
        "hidden_ND": problem.hidden,
        "head": problem.head,
        "targets": problem.targets,
        "labels_N": problem.labels,
        "per_token": objective or linear(problem),
        "divergences": ALL,
        **changes,
    }
    return fused_loss(**args)


def test_a_broken_teacher_is_named(reference):
    problem = reference.problem(d_T=(7, 4))
    problem.targets[1].hidden[6, 0] = torch.nan
    with pytest.raises(ArithmeticError, match=r"^the logits of target 1: not finite at 1 of .*first at 6$"):
        call(problem)
    problem.targets[1].hidden[6, 0] = torch.inf
    with pytest.raises(ArithmeticError, match="target 1"), torch.no_grad():
        call(problem, chunk_rows=2)


def test_a_teacher_that_excludes_tokens_is_named(reference):
    problem = reference.problem(bias=True)
    problem.targets[0].head.bias[3] = -torch.inf
    with pytest.raises(ArithmeticError, match="target 0"):
        call(problem)


def test_a_broken_student_is_named(reference):
    problem = reference.problem()
    with torch.no_grad():
        problem.head.weight[2, 1] = torch.nan
    with pytest.raises(ArithmeticError, match="the student's logits"):
        call(problem)


def test_a_broken_objective_is_named(reference):
    problem = reference.problem()
    with pytest.raises(ArithmeticError, match="objective's value"):
        call(problem, lambda stats, rows: stats.divergence[0, 0] / 0.0)
    with pytest.raises(ArithmeticError, match="objective's derivative"):
        call(problem, lambda stats, rows: (stats.divergence[0, 0] * 0.0).sqrt())
    with pytest.raises(ValueError, match=r"one loss per token, \[13\], but returned \[\]"):
        call(problem, lambda stats, rows: stats.divergence.sum())


def test_labels_outside_the_true_vocabulary(reference):
    problem = reference.problem(pad_S=4)
    for bad in (23, -100):
        labels = problem.labels.clone()
        labels[5] = bad
        with pytest.raises(
            ValueError, match=rf"labels_N\[5\] = {bad} is not in the true vocabulary \[0, 23\)"
        ):
            call(problem, labels_N=labels)


def test_vocabularies_must_agree(reference):
    problem = reference.problem()
    other = reference.problem(vocab=24)
    with pytest.raises(ValueError, match=r"target 0 scores token ids \[0, 24\), the student \[0, 23\); give"):
        call(problem, targets=other.targets)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"temperature": 0.0}, "temperature is 0.0, must be positive"),
        ({"chunk_rows": 0}, "chunk_rows is 0, must be at least 1"),
        (
            {"labels_N": torch.zeros(12, dtype=torch.int64)},
            r"labels_N must be int64 \[13\], got torch.int64 \[12\]",
        ),
        ({"hidden_ND": torch.zeros(2, 13, 5)}, r"hidden_ND must be \[N, d\], got \[2, 13, 5\]"),
        (
            {"hidden_ND": torch.zeros(13, 6)},
            r"the student: hidden states are \[13, 6\], its head needs \[13, 5\]",
        ),
        ({"hidden_ND": torch.zeros(13, 5, dtype=torch.int64)}, "the student: hidden states are torch.int64"),
    ],
)
def test_misfitting_input(reference, change, text):
    with pytest.raises(ValueError, match=text):
        call(reference.problem(), **change)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"weight": torch.zeros(3)}, r"head weight must be \[V, d\]"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, r"head bias must be \[3\]"),
        ({"weight": torch.zeros(3, 2), "num_valid": 4}, "num_valid is 4, but the head has 3 rows"),
        ({"weight": torch.zeros(3, 2), "softcap": 0.0}, "softcap is 0.0, must be positive"),
    ],
)
def test_misfitting_head(options, text):
    with pytest.raises(ValueError, match=text):
        Head(**options)
