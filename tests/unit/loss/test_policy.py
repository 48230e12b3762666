"""The policy functions, token by token: golden vectors, the clip by hand, and what each method reduces to."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeopd.batch.advantages import sequence_kept
from mergeopd.loss.policy import (
    ClipRatio,
    Correction,
    Credit,
    Policy,
    PolicyRows,
    PolicyTokens,
    TrustRegion,
    clipped,
    importance_weight,
    policy_tokens,
    shaped,
)

LOG_S = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5], dtype=torch.float64).log_softmax(0)
LOG_T = torch.tensor([1.0, 1.5, -0.5, 0.0, -1.0], dtype=torch.float64).log_softmax(0)
PPO = ClipRatio(0.2, 0.28)


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rows_of(outcome: Tensor, behaviour: Tensor | None = None, **more: Tensor | None) -> PolicyRows:
    ones = torch.ones_like(outcome)
    behaviour = torch.zeros_like(outcome) if behaviour is None else behaviour
    return replace(PolicyRows(ones, outcome, behaviour, ones), **more)


def evaluate(
    policy: Policy, rows: PolicyRows, log_S: Tensor, log_T: Tensor, weight: Tensor
) -> tuple[PolicyTokens, Tensor]:
    """The tokens, and the gradient of the sum of their losses."""
    leaf = log_S.clone().requires_grad_()
    tokens = policy_tokens(policy, rows, slice(0, len(leaf)), leaf, log_T, weight)
    [gradient] = torch.autograd.grad(tokens.loss.sum(), leaf)
    return tokens, gradient


# Golden vectors


def test_the_advantage_of_a_sampled_token() -> None:
    """`-k1` at token 0; the ratio is 1 at the first update, so the loss is minus the advantage."""
    rows = rows_of(row(0.0))
    tokens, gradient = evaluate(Policy(sampled=1.0), rows, LOG_S[:1], LOG_T[None, :1], row(1.0)[None])
    assert tokens.loss.tolist() == pytest.approx([0.641977], abs=1e-6)
    assert gradient.tolist() == pytest.approx([0.641977], abs=1e-6)


def test_the_ratio_of_a_trust_region() -> None:
    policy = Policy(anchor=TrustRegion(0.5))
    rows = rows_of(row(1.0), old_N=LOG_S[:1])
    tokens, gradient = evaluate(policy, rows, LOG_S[:1], LOG_T[None, :1], row(1.0)[None])
    assert (-tokens.loss).tolist() == pytest.approx([1.378490], abs=1e-6)
    assert (-gradient).tolist() == pytest.approx([1.378490], abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_several_teachers_hold_a_trust_region_by_their_geometric_mean(scale: float) -> None:
    """Weights 1 and 3, whatever denominators they carry: log p_T is (log p_1 + 3 log p_2) / 4."""
    log_T, weight = row(-1.0, -3.0)[:, None], scale * row(1.0, 3.0)[:, None]
    rows = rows_of(row(1.0), old_N=row(-2.0))
    tokens, _ = evaluate(Policy(anchor=TrustRegion(0.5)), rows, row(-2.0), log_T, weight)
    assert (-tokens.loss).item() == pytest.approx(math.exp(-2.0 - 0.5 * -2.0 - 0.5 * -2.5))
    tokens, _ = evaluate(Policy(anchor=Credit(1.0, 0.9)), rows, row(-2.0), log_T, weight)
    assert (-tokens.loss).item() == pytest.approx(math.exp(-2.5 + 2.0))


@pytest.mark.parametrize(
    ("advantage", "mix", "bound", "expected"),
    [
        (1.0, 1.0, 0.999, 0.526251),
        (1.0, 0.5, 0.2, 0.9),
        (1.0, 1.0, 0.2, 0.8),
        (-1.0, 1.0, 0.999, -1.900234),
        (-1.0, 0.5, 0.2, -1.1),
        (-1.0, 1.0, 0.2, -1.2),
    ],
)
def test_shaped_credit(advantage: float, mix: float, bound: float, expected: float) -> None:
    found = shaped(row(advantage), (LOG_T - LOG_S)[:1], Credit(mix, bound))
    assert found.item() == pytest.approx(expected, abs=1e-6)


RHO = row(0.4, 0.5, 1.0, 2.0, 2.1)


@pytest.mark.parametrize(
    ("correction", "expected", "is_corrected"),
    [
        (Correction("none", 0.5, 2.0), [1.0, 1.0, 1.0, 1.0, 1.0], [0, 0, 0, 0, 0]),
        (Correction("mask", 0.5, 2.0), [0.0, 0.5, 1.0, 2.0, 0.0], [1, 0, 0, 0, 1]),
        (Correction("truncate", 0.0, 2.0), [0.4, 0.5, 1.0, 2.0, 2.0], [0, 0, 0, 0, 1]),
        (Correction("truncate", 0.5, 2.0), [0.5, 0.5, 1.0, 2.0, 2.0], [1, 0, 0, 0, 1]),
        (Correction("sequence_mask", 0.5, 2.0), [0.4, 0.5, 1.0, 2.0, 2.1], [0, 0, 0, 0, 0]),
    ],
)
def test_importance_weights(correction: Correction, expected: list[float], is_corrected: list[int]) -> None:
    # 0.5 and 2 are exact in binary, their logarithms' exponentials need not be: one ulp inside.
    log_rho = torch.where(RHO == 0.5, RHO.log() + 1e-15, RHO.log() - 1e-15)
    weight, marked = importance_weight(log_rho, correction)
    assert weight.tolist() == pytest.approx(expected, abs=1e-12)
    assert marked.tolist() == [bool(value) for value in is_corrected]


def test_bounds_belong_to_the_band() -> None:
    weight, marked = importance_weight(row(0.0), Correction("mask", 1.0, 1.5))
    assert weight.item() == 1.0
    assert not marked.item()
    weight, _ = importance_weight(row(0.0), Correction("mask", 0.5, 1.0))
    assert weight.item() == 1.0
    assert sequence_kept(row(0.0, 0.0), Correction("sequence_mask", 1.0, 1.5))
    assert sequence_kept(row(0.0, 0.0), Correction("sequence_mask", 0.5, 1.0))


def test_a_sequence_is_judged_by_its_geometric_mean() -> None:
    """4 and 1/4 make 1; 4 and 1 make 2, though their arithmetic mean is 2.5."""
    correction = Correction("sequence_mask", 0.9, 2.2)
    assert sequence_kept(row(4.0, 0.25).log(), correction)
    assert sequence_kept(row(4.0, 1.0).log(), correction)
    assert not sequence_kept(row(4.0, 2.0).log(), correction)
    assert not sequence_kept(row(0.5, 1.0).log(), correction)
    assert sequence_kept(row(), correction)
    assert sequence_kept(row(9.0).log(), Correction("mask", 0.9, 2.2))


# The clip by hand: columns are ratio, advantage, value, is_clipped.


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "is_clipped"),
    [
        (1.0, 2.0, 2.0, False),
        (1.28, 2.0, 2.56, False),  # at the bound
        (1.5, 2.0, 2.56, True),  # gone far enough
        (0.5, 2.0, 1.0, False),  # went the wrong way: still pulled
        (0.5, -2.0, -1.6, True),
        (0.8, -2.0, -1.6, False),
        (1.5, -2.0, -3.0, False),  # below the dual bound
        (3.0, -2.0, -6.0, False),
        (5.0, -2.0, -6.0, True),  # above it
        (5.0, 2.0, 2.56, True),
        (5.0, 0.0, 0.0, False),
        (0.1, 0.0, 0.0, False),
    ],
)
def test_clip_and_dual_clip(ratio: float, advantage: float, value: float, is_clipped: bool) -> None:
    leaf = row(ratio).requires_grad_()
    found, marked = clipped(leaf, row(advantage), ClipRatio(0.2, 0.28, dual=3.0))
    [gradient] = torch.autograd.grad(found.sum(), leaf)
    assert found.item() == pytest.approx(value, abs=1e-15)
    assert marked.item() is is_clipped
    assert gradient.item() == (0.0 if is_clipped else advantage)


def test_without_the_dual_bound_a_bad_token_is_pushed_down_without_limit() -> None:
    value, is_clipped = clipped(row(50.0), row(-2.0), PPO)
    assert value.item() == -100.0
    assert not is_clipped.item()


@given(
    st.floats(0.01, 10.0),
    st.floats(-3.0, 3.0),
    st.floats(0.05, 0.9),
    st.floats(0.05, 3.0),
    st.floats(0.0, 5.0),
)
def test_the_surrogate_is_the_textbooks_and_homogeneous(
    ratio: float, advantage: float, low: float, high: float, factor: float
) -> None:
    clip = ClipRatio(low, high)
    value, is_clipped = clipped(row(ratio), row(advantage), clip)
    limited = min(max(ratio, 1.0 - low), 1.0 + high)
    assert value.item() == min(ratio * advantage, limited * advantage)
    assert is_clipped.item() is (limited * advantage < ratio * advantage)
    scaled, _ = clipped(row(ratio), row(factor * advantage), clip)
    assert scaled.item() == pytest.approx(factor * value.item(), rel=1e-12, abs=1e-12)


# Reductions, on values and gradients


def problem(seed: int = 0, num: int = 64, teachers: int = 2) -> tuple[PolicyRows, Tensor, Tensor, Tensor]:
    """Tokens on both sides of every bound: ratios, gaps, outcomes, behaviour policies."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    log_S, log_T = -randn(num).abs() - 0.1, -randn(teachers, num).abs()
    rows = rows_of(randn(num), log_S + 0.4 * randn(num), old_N=log_S + 0.3 * randn(num))
    return rows, log_S, log_T, torch.rand(teachers, num, generator=g, dtype=torch.float64)


def is_same(a: tuple[PolicyTokens, Tensor], b: tuple[PolicyTokens, Tensor]) -> bool:
    """Bit for bit, loss, gradient and what bounds did."""
    return all(
        torch.equal(x, y)
        for x, y in (
            (a[0].loss, b[0].loss),
            (a[1], b[1]),
            (a[0].is_clipped, b[0].is_clipped),
            (a[0].is_corrected, b[0].is_corrected),
        )
    )


GRPO = Policy(clip=PPO)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "policy",
    [
        replace(GRPO, anchor=TrustRegion(1.0)),
        replace(GRPO, anchor=Credit(0.0, 0.2)),
        replace(GRPO, sampled=0.0, bound=0.1),
        replace(GRPO, correction=Correction("none", 0.9, 1.1)),
    ],
)
def test_cases_that_reduce_to_grpo(policy: Policy, first: bool) -> None:
    rows, log_S, log_T, weight = problem()
    rows = replace(rows, old_N=None) if first else rows
    assert is_same(evaluate(policy, rows, log_S, log_T, weight), evaluate(GRPO, rows, log_S, log_T, weight))


@pytest.mark.parametrize("anchor", [TrustRegion(0.5), Credit(1.0, 0.2)])
def test_a_teacher_that_agrees_or_is_silent_leaves_grpo(anchor: TrustRegion | Credit) -> None:
    rows, log_S, log_T, weight = problem()
    plain = evaluate(GRPO, rows, log_S, log_T, weight)
    policy = replace(GRPO, anchor=anchor)
    agreed = rows.old_N if isinstance(anchor, TrustRegion) else log_S
    assert agreed is not None
    found = evaluate(policy, rows, log_S, agreed.expand(2, -1), weight)
    assert found[0].loss.tolist() == pytest.approx(plain[0].loss.tolist(), abs=1e-14)
    assert found[1].tolist() == pytest.approx(plain[1].tolist(), abs=1e-14)
    assert is_same(evaluate(policy, rows, log_S, log_T, 0 * weight), plain)


def test_no_outcome_is_pure_distillation_and_the_parts_add_up() -> None:
    """Without a clip the surrogate is linear in the advantage."""
    rows, log_S, log_T, weight = problem()
    both = evaluate(Policy(sampled=0.7), rows, log_S, log_T, weight)
    teacher = evaluate(Policy(sampled=0.7), replace(rows, outcome_N=0 * log_S), log_S, log_T, weight)
    outcome = evaluate(Policy(), rows, log_S, log_T, weight)
    assert torch.allclose(both[0].loss, teacher[0].loss + outcome[0].loss, atol=1e-14)
    assert torch.allclose(both[1], teacher[1] + outcome[1], atol=1e-14)
    assert rows.old_N is not None
    gaps = (weight * (log_T - log_S)).sum(0)
    assert torch.allclose(teacher[0].loss, -0.7 * (log_S - rows.old_N).exp() * gaps, atol=1e-14)


@pytest.mark.parametrize(
    ("wide", "plain"),
    [
        (Policy(sampled=1.0, clip=ClipRatio(1 - 1e-9, 1e9)), Policy(sampled=1.0)),
        (Policy(sampled=1.0, clip=ClipRatio(0.2, 0.28, 1e9)), Policy(sampled=1.0, clip=PPO)),
        (Policy(sampled=1.0, bound=1e9), Policy(sampled=1.0)),
        (
            Policy(sampled=1.0, correction=Correction("mask", 0.0, 1e9)),
            Policy(sampled=1.0, correction=Correction("truncate", 0.0, 1e9)),
        ),
        (
            Policy(sampled=1.0, correction=Correction("sequence_mask", 0.999, 1.002)),  # all answers kept
            Policy(sampled=1.0, correction=Correction("truncate")),
        ),
    ],
)
def test_generous_bounds_are_none(wide: Policy, plain: Policy) -> None:
    args = problem()
    assert is_same(evaluate(wide, *args), evaluate(plain, *args))


def test_where_old_policy_and_behaviour_agree_no_correction_does_anything() -> None:
    rows, log_S, log_T, weight = problem()
    assert rows.old_N is not None
    rows = replace(rows, behaviour_N=rows.old_N)
    plain = evaluate(Policy(sampled=1.0, clip=PPO), rows, log_S, log_T, weight)
    for kind in ("truncate", "mask", "sequence_mask"):
        policy = Policy(sampled=1.0, clip=PPO, correction=Correction(kind, 0.9, 1.1))  # type: ignore[arg-type]
        assert is_same(evaluate(policy, rows, log_S, log_T, weight), plain)


def test_masked_tokens_leave_the_others_alone() -> None:
    args = problem()
    open_, closed = (
        evaluate(Policy(sampled=1.0, correction=Correction("mask", *band)), *args)
        for band in ((0.0, 1e9), (0.8, 1.25))
    )
    masked = closed[0].is_corrected
    assert masked.any()
    assert not masked.all()
    assert torch.equal(closed[0].loss[~masked], open_[0].loss[~masked])
    assert torch.equal(closed[1][~masked], open_[1][~masked])
    assert not closed[0].loss[masked].any()
    assert not closed[1][masked].any()


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(-30, 30)), min_size=1),
    st.floats(0, 1),
    st.floats(0.01, 0.99),
)
def test_credit_keeps_the_sign_and_its_bounds(
    pairs: list[tuple[float, float]], mix: float, bound: float
) -> None:
    advantage, gap = row(*(a for a, _ in pairs)), row(*(d for _, d in pairs))
    found = shaped(advantage, gap, Credit(mix, bound))
    assert torch.equal(found.sign(), advantage.sign())
    size = advantage.abs()
    assert (found.abs() <= size * (1 + mix * bound) + 1e-12).all()
    assert (found.abs() >= size * (1 - mix * bound) - 1e-12).all()
    assert torch.allclose(shaped(advantage, 0 * gap, Credit(mix, bound)), advantage, atol=1e-15, rtol=1e-15)


# Who gets a policy term


def test_responses_of_others_have_no_policy_term() -> None:
    rows, log_S, log_T, weight = problem()
    assert rows.old_N is not None
    other = torch.arange(len(log_S)) % 2 == 0
    # As the engine fills the rows of such tokens: nothing is known of them.
    blank = [torch.where(other, 0.0, x) for x in (rows.own_N, rows.outcome_N, rows.behaviour_N, rows.old_N)]
    mixed = PolicyRows(blank[0], blank[1], blank[2], rows.keep_N, blank[3])
    policy = Policy(sampled=1.0, clip=PPO, correction=Correction("mask", 0.8, 1.25))
    found, plain = evaluate(policy, mixed, log_S, log_T, weight), evaluate(policy, rows, log_S, log_T, weight)
    assert not found[0].loss[other].any()
    assert not found[1][other].any()
    assert not (found[0].is_clipped | found[0].is_corrected)[other].any()
    assert not found[0].log_ratio_old[other].any()
    assert torch.equal(found[0].loss[~other], plain[0].loss[~other])
    assert torch.equal(found[1][~other], plain[1][~other])


def test_a_dropped_answer_takes_nothing_with_it() -> None:
    rows, log_S, log_T, weight = problem()
    dropped = torch.arange(len(log_S)) < 20
    some = replace(rows, keep_N=1.0 - dropped.double())
    policy = Policy(sampled=1.0, clip=PPO, correction=Correction("sequence_mask", 0.9, 1.1))
    found, plain = evaluate(policy, some, log_S, log_T, weight), evaluate(policy, rows, log_S, log_T, weight)
    assert not found[0].loss[dropped].any()
    assert not found[1][dropped].any()
    assert found[0].is_corrected.tolist() == dropped.tolist()
    assert torch.equal(found[0].loss[~dropped], plain[0].loss[~dropped])
    assert torch.equal(found[1][~dropped], plain[1][~dropped])


@pytest.mark.parametrize("kind", ["none", "truncate", "mask", "sequence_mask"])
@pytest.mark.parametrize("anchor", [None, TrustRegion(0.0), Credit(1.0, 0.9)])
@pytest.mark.parametrize("far", [1e4, -1e4])
def test_absurd_log_probabilities_make_no_nan(
    kind: str, anchor: TrustRegion | Credit | None, far: float
) -> None:
    rows, log_S, log_T, weight = problem()
    assert rows.old_N is not None
    policy = Policy(1.0, None, PPO, Correction(kind, 0.5, 2.0), anchor)  # type: ignore[arg-type]
    for changed in (
        replace(rows, behaviour_N=rows.behaviour_N + far),
        replace(rows, old_N=rows.old_N + far),
        replace(rows, outcome_N=0 * rows.outcome_N),
    ):
        for teacher in (log_T, log_T + far):
            tokens, gradient = evaluate(policy, changed, log_S, teacher, weight)
            assert torch.isfinite(tokens.loss).all()
            assert torch.isfinite(gradient).all()
