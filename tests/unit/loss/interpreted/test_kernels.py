"""The Triton kernels in their interpreter, against full logits and autograd in float64."""

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
    Support,
    fused_loss,
    heads,
)
from mergeopd.loss.triton import scorer

ALL = (
    ForwardKL(),
    ReverseKL(),
    JSD(0.3),
    TVD(),
    SkewForwardKL(0.1),
    SkewReverseKL(0.2),
    AlphaDivergence(0.7),
    ClippedForwardKL(0.05),
)
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.4},
    "softcap": {"softcap": 2.5},
    "padding": {"pad_S": 3, "pad_T": 6},
    "parts of several blocks": {"num": 9, "vocab": 16 * 8 + 5},
    "one column": {"num": 3, "vocab": 1},
    "all": {"bias": True, "scale": 1.7, "softcap": 6.0, "pad_S": 5, "pad_T": 2, "d_T": (3, 8, 4)},
}
LARGE = (32, 512, 1)  # rows and columns of a block, warps
STATS = ("divergence", "logprob_S", "logprob_T", "entropy_S", "entropy_T")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks and parts also in a small vocabulary."""
    monkeypatch.setattr(scorer, "_INTERPRETED", (8, 16, 1))


def linear(problem):
    return lambda stats, rows: stats.divergence.sum((0, 1)) * problem.weights[rows]


def mixed(problem):
    """Nonlinear in divergences and log-probability, and a product of both."""

    def objective(stats, rows):
        total = (stats.divergence.clamp(max=2.0) ** 2).sum((0, 1)) * stats.logprob_S.exp()
        return (total + stats.logprob_S**2 * (1.0 + 0.3 * stats.entropy_S)) * problem.weights[rows]

    return objective


def fused(problem, objective, divergences, **options):
    arguments = (problem.hidden, problem.head, problem.targets, problem.labels, objective(problem))
    return fused_loss(*arguments, divergences=divergences, kernel="triton", **options)


def compare(reference, problem, objective, divergences, temperature=1.0, **options):
    expected, stats_expected = reference.loss(
        problem.hidden, problem.head, problem.targets, problem.labels, objective(problem),
        divergences=divergences, temperature=temperature,
    )  # fmt: skip
    loss, stats = fused(problem, objective, divergences, temperature=temperature, **options)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-11, abs=1e-12)
    for name in STATS:
        torch.testing.assert_close(
            getattr(stats, name), getattr(stats_expected, name), rtol=1e-10, atol=1e-11, check_dtype=False
        )
    pairs = zip(reference.gradients(loss, problem), reference.gradients(expected, problem), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("option", OPTIONS)
def test_all_divergences_equal_autograd_on_full_logits(reference, option):
    compare(reference, reference.problem(**OPTIONS[option]), mixed, ALL, 1.5)


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_each_divergence_alone(reference, divergence):
    """Alone it decides whether a second pass over the logits is made. Two chunks, of one gradient product."""
    compare(reference, reference.problem(d_T=(7, 4)), linear, (divergence,), chunk_rows=7)


def test_without_teachers_or_divergences(reference):
    def nll(problem):
        return lambda stats, rows: -stats.logprob_S * problem.weights[rows]

    compare(reference, reference.problem(d_T=(), bias=True, softcap=4.0), nll, (ReverseKL(),), 0.7)
    compare(reference, reference.problem(d_T=(3, 3)), nll, ())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_teacher_equal_to_the_student_is_a_fixed_point(reference, monkeypatch, dtype):
    monkeypatch.setattr(scorer, "_INTERPRETED", LARGE)
    problem = reference.problem(num=20, vocab=301, dtype=dtype, bias=True, softcap=20.0)
    problem.targets = [Hidden(problem.hidden.detach(), problem.head)]
    loss, stats = fused(problem, linear, ALL)
    assert stats.divergence.abs().max() == 0.0
    for gradient in reference.gradients(loss, problem):
        assert gradient.abs().max() < (1e-13 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_float32_stays_near_float64(reference, monkeypatch, divergence):
    monkeypatch.setattr(scorer, "_INTERPRETED", LARGE)
    shape = {"num": 32, "vocab": 1021, "d_S": 24, "d_T": (16,), "spread": 0.8}
    exact, single = reference.problem(**shape), reference.problem(**shape, dtype=torch.float32)
    wanted_loss, wanted = reference.loss(
        exact.hidden, exact.head, exact.targets, exact.labels, linear(exact), divergences=[divergence]
    )
    loss, stats = fused(single, linear, [divergence])
    found = [loss.detach(), stats.divergence, stats.entropy_S, *reference.gradients(loss, single)]
    expected = [wanted_loss, wanted.divergence, wanted.entropy_S, *reference.gradients(wanted_loss, exact)]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() < 1e-5 * other.abs().max()


def test_far_apart_distributions_stay_finite():
    """Thousands of nats, and the student's largest logit in the last block."""
    hidden = torch.eye(4).requires_grad_()
    weight = torch.zeros(70, 4)
    weight[[1, 20, 40, 69]] = 100.0 * torch.eye(4)
    teacher = torch.tensor([[0.0, -1e4, -3e4, 50.0]]).expand(4, 4) * torch.eye(4).neg().add(2.0)
    loss, stats = fused_loss(
        hidden, Head(weight), [Hidden(teacher, Head(weight / 100.0))], torch.tensor([1, 20, 40, 69]),
        lambda stats, rows: stats.divergence[0].sum(0), divergences=ALL, kernel="triton",
    )  # fmt: skip
    loss.backward()
    assert torch.isfinite(stats.divergence).all()
    assert torch.isfinite(hidden.grad).all()


def test_gradient_products_of_several_chunks(reference, monkeypatch):
    """Many rows share a product with the logit gradient, whose memory is its own."""
    problem = reference.problem(num=23)
    expected, _ = fused(problem, mixed, ALL[:2], chunk_rows=23)
    rows, plain = [], heads.Projection.grad_weight

    def spy(self, dz, part, *arguments, **options):
        rows.append(dz.shape[0])
        plain(self, dz, part, *arguments, **options)

    monkeypatch.setattr(heads.Projection, "grad_weight", spy)
    monkeypatch.setattr("mergeopd.loss.slicing._GRADIENT_BYTES", 10 * 23 * 8)
    loss, _ = fused(problem, mixed, ALL[:2], chunk_rows=5)
    assert rows == [10, 10, 3]
    pairs = zip(reference.gradients(loss, problem), reference.gradients(expected, problem), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def test_top_ids_and_overlap_are_those_of_torch(reference):
    problem = reference.problem(bias=True, softcap=9.0)
    arguments = (problem.hidden, problem.head, problem.targets, problem.labels, linear(problem))
    options = {"divergences": ALL[:1], "top_ids": 4, "overlap_rows": torch.tensor([0, 5, 12]), "overlap_k": 6}
    found, wanted = (fused_loss(*arguments, **options, kernel=kernel)[1] for kernel in ("triton", "torch"))
    assert torch.equal(found.top_ids.sort(1).values, wanted.top_ids.sort(1).values)
    torch.testing.assert_close(found.overlap.advantage, wanted.overlap.advantage)


def test_supports_take_the_torch_operations(reference, monkeypatch):
    monkeypatch.setattr(scorer.TritonScorer, "score", lambda *_, **__: pytest.fail("Triton was used"))
    fused(reference.problem(), linear, ALL[:2], support=Support(3, "student", "tail"))


def test_numbers_that_are_not_finite_are_reported(reference):
    problem = reference.problem()
    problem.targets[0].hidden[4] = torch.nan
    with pytest.raises(ArithmeticError, match=r"the logits of target 0: not finite at 1 of .* first at 4"):
        fused(problem, linear, ALL)
