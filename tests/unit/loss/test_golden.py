"""Golden vectors: five tokens, an identity head, so that hidden states are logits and dH is dz."""

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
    fused_loss,
)

Z_S, Z_T = [2.0, 1.0, 0.0, -1.0, 0.5], [1.0, 1.5, -0.5, 0.0, -1.0]
HEAD = Head(torch.eye(5, dtype=torch.float64))


def run(divergence, teachers=(Z_T,), weights=(1.0,), temperature=1.0, dtype=torch.float64, z_S=Z_S):
    head = Head(HEAD.weight.to(dtype))
    hidden = torch.tensor([z_S], dtype=dtype, requires_grad=True)
    targets = [Hidden(torch.tensor([z], dtype=dtype), head) for z in teachers]
    factor = torch.tensor(weights, dtype=dtype)[:, None] * temperature**2

    def objective(stats, rows):
        return (factor * stats.divergence[:, 0]).sum(0)

    loss, stats = fused_loss(
        hidden, head, targets, torch.tensor([0]), objective, divergences=[divergence], temperature=temperature
    )
    loss.backward()
    return loss.item(), hidden.grad[0].tolist(), stats


GOLDEN = [
    (ForwardKL(), 1.0, 0.321778, [0.266731, -0.281376, 0.010085, -0.080968, 0.085528]),
    (ReverseKL(), 1.0, 0.299944, [0.192572, -0.239843, -0.012037, -0.046475, 0.105782]),
    (JSD(0.5), 1.0, 0.074872, [0.054345, -0.061684, -0.000336, -0.013609, 0.021284]),
    (JSD(0.1), 1.0, 0.028330, None),
    (JSD(0.9), 1.0, 0.026832, None),
    (TVD(), 1.0, 0.362344, [0.132397, -0.158418, 0.017918, -0.021440, 0.029542]),
    (SkewForwardKL(0.1), 1.0, 0.249983, None),
    (SkewReverseKL(0.1), 1.0, 0.240421, None),
    (ClippedForwardKL(0.05), 1.0, -0.145390, None),
    (ForwardKL(), 2.0, 0.372489, [0.213012, -0.233992, 0.022350, -0.158003, 0.156633]),
]


@pytest.mark.parametrize(("divergence", "temperature", "value", "gradient"), GOLDEN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients(divergence, temperature, value, gradient, dtype):
    loss, dz, stats = run(divergence, temperature=temperature, dtype=dtype)
    assert loss == pytest.approx(value, abs=1e-6)
    if gradient is not None:
        assert dz == pytest.approx(gradient, abs=1e-6)
    assert sum(dz) == pytest.approx(0.0, abs=1e-14 if dtype == torch.float64 else 5e-7)
    assert stats.loss.item() == loss


def test_sampled_token_and_entropies():
    _, _, stats = run(ReverseKL())
    p_S = torch.tensor([0.563021, 0.207124, 0.076197, 0.028031, 0.125627], dtype=torch.float64)
    p_T = torch.tensor([0.296290, 0.488500, 0.066111, 0.108999, 0.040099], dtype=torch.float64)
    assert stats.logprob_S.item() == pytest.approx(p_S[0].log().item(), abs=2e-6)
    assert (stats.logprob_T[0] - stats.logprob_S).item() == pytest.approx(-0.641977, abs=1e-6)
    assert stats.entropy_S.item() == pytest.approx(-(p_S * p_S.log()).sum().item(), abs=5e-6)
    assert stats.entropy_T.item() == pytest.approx(-(p_T * p_T.log()).sum().item(), abs=5e-6)
    assert abs(stats.entropy_S - stats.entropy_T).item() == pytest.approx(0.054039, abs=1e-6)


def test_two_weighted_teachers():
    """Their sum has a floor, `-W log Z`: the mass that their geometric mean lacks."""
    second = [0.0, 0.0, 2.0, 0.0, 0.0]
    loss, _, _ = run(ReverseKL(), teachers=(Z_T, second), weights=(0.7, 0.3))
    assert loss == pytest.approx(0.532092, abs=1e-6)
    mean = 0.7 * torch.tensor(Z_T, dtype=torch.float64).log_softmax(0)
    mean += 0.3 * torch.tensor(second, dtype=torch.float64).log_softmax(0)
    floor, dz, _ = run(ReverseKL(), teachers=(Z_T, second), weights=(0.7, 0.3), z_S=mean.tolist())
    assert floor == pytest.approx(0.246317, abs=1e-6)
    assert dz == pytest.approx([0.0] * 5, abs=1e-14)
    assert loss - floor == pytest.approx(0.285775, abs=1e-6)


def test_jsd_limits():
    """JSD_b / b -> forward KL at b -> 0, JSD_b / (1 - b) -> reverse KL at b -> 1; symmetric at 1/2; <= log 2."""
    assert run(JSD(1e-7))[0] / 1e-7 == pytest.approx(0.321778, abs=2e-6)
    assert run(JSD(1 - 1e-7))[0] / 1e-7 == pytest.approx(0.299944, abs=2e-6)
    assert run(JSD(0.5))[0] == pytest.approx(run(JSD(0.5), teachers=(Z_S,), z_S=Z_T)[0], abs=1e-15)
    far = run(JSD(0.5), teachers=([0.0, 0, 0, 0, 900.0],), z_S=[900.0, 0, 0, 0, 0])
    assert far[0] == pytest.approx(0.6931471805599453, abs=1e-12)
    assert far[1] == pytest.approx([0.0] * 5, abs=1e-12)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, float("nan")])
def test_jsd_refuses_its_ends(beta):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        JSD(beta)


def test_skewed_kls_tend_to_the_plain_ones():
    for skewed, plain in ((SkewForwardKL(1e-3), ForwardKL()), (SkewReverseKL(1e-3), ReverseKL())):
        assert run(skewed)[0] == pytest.approx(run(plain)[0], rel=1e-2)
        assert run(skewed)[1] == pytest.approx(run(plain)[1], rel=1e-2)


@pytest.mark.parametrize("alpha", [0.0, 1e-7, 1.0, float("nan")])
def test_skewed_kls_reject_a_skew_below_float32_precision(alpha):
    for skewed in (SkewForwardKL, SkewReverseKL):
        with pytest.raises(ValueError, match=r"\[0.001, 1\); at 0 use the plain KL"):
            skewed(alpha)


@pytest.mark.parametrize("gap", [10.0, 17.0, 18.0, 40.0])
def test_skewed_kls_far_from_equality_in_float32(gap):
    """Three tokens, one of them unlikely on one side, against the definition in float64."""
    sure, flat = torch.tensor([[0.0, 0.0, -gap]]), torch.zeros(1, 3)
    for skewed, z_S, z_T in ((SkewForwardKL(1e-3), sure, flat), (SkewReverseKL(1e-3), flat, sure)):
        log_S, log_T = (z.double().log_softmax(1)[0] for z in (z_S, z_T))
        first, other = (log_T, log_S) if isinstance(skewed, SkewForwardKL) else (log_S, log_T)
        mixture = 1e-3 * first.exp() + (1 - 1e-3) * other.exp()
        expected = (first.exp() * (first - mixture.log())).sum()
        _, stats = fused_loss(
            z_S, Head(torch.eye(3)), [Hidden(z_T, Head(torch.eye(3)))], torch.tensor([0]),
            lambda stats, rows: stats.divergence[0, 0], divergences=[skewed],
        )  # fmt: skip
        assert float(stats.divergence[0, 0, 0]) == pytest.approx(float(expected), rel=1e-4)


def test_the_alpha_divergence_lies_between_the_kls():
    for alpha, end in ((1e-7, ReverseKL()), (1 - 1e-7, ForwardKL())):
        assert run(AlphaDivergence(alpha))[0] == pytest.approx(run(end)[0], abs=1e-6)
        assert run(AlphaDivergence(alpha))[1] == pytest.approx(run(end)[1], abs=1e-6)
    p_S, p_T = torch.tensor(Z_S).double().softmax(0), torch.tensor(Z_T).double().softmax(0)
    hellinger = 0.5 * float((p_S.sqrt() - p_T.sqrt()).square().sum())
    assert run(AlphaDivergence(0.5))[0] == pytest.approx(4 * hellinger, abs=1e-14)
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        AlphaDivergence(1.0)


def test_a_generous_cap_is_no_cap():
    assert run(ClippedForwardKL(10.0))[0] == pytest.approx(run(ForwardKL())[0], abs=1e-15)
    assert run(ClippedForwardKL(10.0))[1] == pytest.approx(run(ForwardKL())[1], abs=1e-15)


def test_tvd_is_a_distance_of_at_most_one():
    assert run(TVD())[0] == pytest.approx(run(TVD(), teachers=(Z_S,), z_S=Z_T)[0], abs=1e-15)
    far, dz, _ = run(TVD(), teachers=([0.0, 0, 0, 0, 900.0],), z_S=[900.0, 0, 0, 0, 0])
    assert far == pytest.approx(1.0, abs=1e-15)
    assert dz == pytest.approx([0.0] * 5, abs=1e-15)
