"""The kernel on the device against float64 on a CPU: full logits and autograd, or the CPU's own kernel."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loss_reference import gradients, make_problem, naive_loss
from torch import Tensor

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
    observe,
)
from mergeopd.loss.objective import LinearObjective

ALL = (
    ReverseKL(),
    ForwardKL(),
    JSD(0.3),
    TVD(),
    SkewForwardKL(0.1),
    SkewReverseKL(0.2),
    AlphaDivergence(0.7),
    ClippedForwardKL(0.05),
)
# Products of half-precision operands: the logit gradient is rounded to them before it meets head and states.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 1e-2}
SHAPES = {
    "odd": {"num": 131, "vocab": 1003, "d_S": 37, "d_T": (53,)},
    "tiny": {"num": 3, "vocab": 5, "d_S": 2, "d_T": (3,)},
    "three teachers": {"num": 70, "vocab": 517, "d_S": 24, "d_T": (16, 40, 8)},
    "all options": {
        "num": 61, "vocab": 301, "d_S": 16, "d_T": (24, 8),
        "bias": True, "scale": 1.7, "softcap": 6.0, "pad_S": 5, "pad_T": 2,
    },
}  # fmt: skip


def linear(problem: Any) -> Any:
    return lambda stats, rows: stats.divergence.sum((0, 1)) * problem.weights[rows]


def nll(problem: Any) -> Any:
    return lambda stats, rows: -stats.logprob_S * problem.weights[rows]


def moved(problem: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Copy the problem to a device; parameters and hidden states are leaves."""

    def tensor(value: Tensor) -> Tensor:
        return value.detach().to(device=device, dtype=dtype).requires_grad_(value.requires_grad)

    def head(own: Head) -> Head:
        bias = None if own.bias is None else tensor(own.bias)
        return Head(tensor(own.weight), bias, own.scale, own.softcap, own.num_valid)

    return SimpleNamespace(
        hidden=tensor(problem.hidden),
        head=head(problem.head),
        targets=[Hidden(tensor(t.hidden), head(t.head)) for t in problem.targets],
        labels=problem.labels.to(device),
        weights=problem.weights.to(device=device, dtype=torch.promote_types(dtype, torch.float32)),
    )


def relative(actual: Tensor, expected: Tensor) -> float:
    distance = (actual.detach().cpu().double() - expected).norm()
    return float(distance / expected.norm().clamp(min=1e-12))


def assert_same(
    actual: tuple[Tensor, Any], expected: tuple[Tensor, Any], there: Any, here: Any, tolerance: float
) -> None:
    # Logits of half-precision operands are exact to float32: statistics are far better than gradients.
    close = min(tolerance, 1e-4)
    assert relative(actual[0], expected[0]) < close
    for name in ("divergence", "logprob_S", "logprob_T", "entropy_S", "entropy_T"):
        value, wanted = getattr(actual[1], name), getattr(expected[1], name)
        assert value.device == there.hidden.device
        if wanted.numel():
            assert relative(value, wanted) < close, name
    of_found, of_expected = gradients(actual[0], there), gradients(expected[0], here)
    for gradient, wanted in zip(of_found, of_expected, strict=True):
        assert relative(gradient, wanted) < tolerance


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_divergences_equal_autograd_on_full_logits(
    device: torch.device, shape: str, dtype: torch.dtype, kernel: Any
) -> None:
    if kernel == "triton" and device.type != "cuda":
        pytest.skip("the interpreter is tested in tests/unit/loss")
    rounded = moved(make_problem(**SHAPES[shape], spread=0.3), torch.device("cpu"), dtype)
    here, there = moved(rounded, torch.device("cpu"), torch.float64), moved(rounded, device, dtype)
    for divergences in (*((one,) for one in ALL), ALL):
        for chunk_rows in (None, 50):
            expected = naive_loss(
                here.hidden, here.head, here.targets, here.labels, linear(here),
                divergences=divergences, temperature=1.5,
            )  # fmt: skip
            actual = fused_loss(
                there.hidden, there.head, there.targets, there.labels, linear(there),
                divergences=divergences, temperature=1.5, chunk_rows=chunk_rows, kernel=kernel,
            )  # fmt: skip
            assert_same(actual, expected, there, here, TOLERANCES[dtype])
    expected = naive_loss(here.hidden, here.head, [], here.labels, nll(here), divergences=())
    actual = fused_loss(there.hidden, there.head, [], there.labels, nll(there), divergences=(), kernel=kernel)
    assert_same(actual, expected, there, here, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rest", ["tail", "generalised"])
@pytest.mark.parametrize("of", ["student", "teacher", "union"])
def test_supports_equal_those_of_the_cpu(
    device: torch.device, of: Any, rest: Any, dtype: torch.dtype
) -> None:
    """For `teacher` also with targets of `observe`. The top k are chosen from equal logits."""
    rounded = moved(make_problem(**SHAPES["three teachers"]), torch.device("cpu"), dtype)
    here, there = moved(rounded, torch.device("cpu"), torch.float64), moved(rounded, device, dtype)
    divergences = (ReverseKL(), ForwardKL()) if rest == "generalised" else ALL
    support = Support(17, of, rest)

    def loss(problem: Any, targets: Any) -> tuple[Tensor, Any]:
        return fused_loss(
            problem.hidden, problem.head, targets, problem.labels, linear(problem),
            divergences=divergences, support=support,
        )  # fmt: skip

    expected = loss(here, here.targets)
    assert_same(loss(there, there.targets), expected, there, here, TOLERANCES[dtype])
    if of == "teacher":
        kept = [observe(t.hidden, t.head, there.labels, top_k=17) for t in there.targets]
        expected = loss(here, here.targets)
        assert_same(loss(there, kept), expected, there, here, TOLERANCES[dtype])


def test_auto_waits_for_the_device_once(device: torch.device) -> None:
    """Reading a flag at the end is the only wait that a call with a linear objective needs."""
    if device.type != "cuda":
        pytest.skip("only a GPU runs ahead of the host")
    problem = moved(make_problem(**SHAPES["odd"], spread=0.3), device, torch.bfloat16)
    objective = LinearObjective(problem.weights.expand(1, 1, -1), None)

    def loss() -> Tensor:
        return fused_loss(
            problem.hidden, problem.head, problem.targets, problem.labels, objective, divergences=ALL[:1]
        )[0]

    loss().backward()  # compiles
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            loss().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([one for one in waits if "synchroniz" in str(one.message)]) <= 1


def test_a_float32_gradient_of_a_half_precision_head(device: torch.device) -> None:
    """Summed over two micro-batches; rounding to bfloat16 before would cost three digits."""
    problem = moved(make_problem(**SHAPES["odd"], spread=0.3), device, torch.bfloat16)
    total = torch.zeros_like(problem.head.weight, dtype=torch.float32)
    head = Head(problem.head.weight, num_valid=problem.head.num_valid, weight_grad=total)
    for _ in range(2):
        loss, _ = fused_loss(
            problem.hidden, head, problem.targets, problem.labels, linear(problem), divergences=ALL[:1]
        )
        loss.backward()
    assert problem.head.weight.grad is None
    assert not torch.equal(total, total.bfloat16().float())
    plain, _ = fused_loss(
        problem.hidden, problem.head, problem.targets, problem.labels, linear(problem), divergences=ALL[:1]
    )
    plain.backward()
    assert relative(total, 2 * problem.head.weight.grad.cpu().double()) < 4e-3
