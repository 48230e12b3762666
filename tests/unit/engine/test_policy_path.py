"""Budgets, masks, ramps and their figures through the whole path, against plain arithmetic.

The answers and models of test_exact_policy. At a round's first update all ratios are 1, so what the engine
accumulates must be `-sum of c_t log p_S(y_t)` with one plain number c_t per token, plus exact divergences.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from enumeration import (
    Plain,
    advantages,
    assert_equal,
    engine_round,
    first_update,
    is_zero,
    methods_parts,
    rewards_of,
    rollout_logprobs,
)

from mergeopd.engine.schedule import split_updates

Write = Callable[..., Path]


# Corrections and the figures about them


def test_sequence_mask_and_its_figures(write_job: Write) -> None:
    low, high = 0.8, 1.3
    parts = methods_parts(
        write_job,
        loss={"sampled_reverse_kl": 1.0, "outcome": 0.5},
        correction={"kind": "sequence_mask", "low": low, "high": high},
    )
    plain = Plain(parts)
    grades = rewards_of(plain.rollouts)
    scaled = advantages(plain.rollouts, grades, "unbiased")
    total, kept, weights, gaps = torch.zeros((), dtype=torch.float64), [], [], []
    for i, lp in enumerate(plain.lp):
        rho = plain.rho(i)
        kept.append(low <= math.exp(float(rho.log().mean())) <= high)
        total = total - kept[i] * (rho * (plain.d(i) + 0.5 * scaled[i]) * lp).sum()
        weights += [kept[i] * float(x) for x in rho]
        gaps += [abs(float(x)) for x in rho.log()]
    assert 10 < sum(kept) < len(kept) - 10
    [(gradient, stats)] = engine_round(parts, plain.rollouts, grades)
    assert_equal(gradient, plain.gradient(total / plain.num_tokens()), 1e-10)
    found = stats.policy(0.25)
    assert found is not None
    dropped = plain.num_tokens([i for i, is_kept in enumerate(kept) if not is_kept])
    assert found.corrected_fraction == pytest.approx(dropped / plain.num_tokens())
    assert found.importance_weight == pytest.approx(statistics.fmean(weights))
    assert found.rollout_logprob_gap == pytest.approx(statistics.fmean(gaps))
    assert found.rollout_logprob_gap_max == pytest.approx(max(gaps))
    assert found.clipped_fraction == 0.0
    assert found.zero_advantage_fraction == 0.25


def test_figures_of_the_second_update(write_job: Write) -> None:
    """The ratio has moved: what the clip and the band do is counted token by token."""
    low, high, sgd_lr = 0.8, 1.25, 2.0
    parts = methods_parts(
        write_job,
        loss={"outcome": 1.0, "sampled_reverse_kl": 0.5},
        correction={"kind": "mask", "low": low, "high": high},
        clip_ratio={"low": 0.1, "high": 0.1},
        updates_per_round=2,
    )
    plain = Plain(parts)
    grades = rewards_of(plain.rollouts)
    scaled = advantages(plain.rollouts, grades, "unbiased")
    (first, _), (_, stats) = engine_round(parts, plain.rollouts, grades, sgd_lr=sgd_lr)
    with torch.no_grad():
        for name, parameter in plain.reference.student.named_parameters():
            parameter -= sgd_lr * first[name]
    _, second = split_updates(plain.rollouts, 2)
    num, num_masked, num_clipped, weights = plain.num_tokens(second), 0, 0, 0.0
    with torch.no_grad():
        students = rollout_logprobs(plain.reference.student, [plain.rollouts[i] for i in second], 1.0)
    for i, log_s in zip(second, students, strict=True):
        r = plain.rollouts[i]
        moved = log_s.gather(1, torch.tensor(r.response_ids)[:, None])[:, 0] - plain.lp[i].detach()
        for t, ratio in enumerate(moved.exp().tolist()):
            rho = float(plain.rho(i)[t])
            num_masked += not low <= rho <= high
            weights += rho if low <= rho <= high else 0.0
            # log p_T - log p_S under the weights as they are now
            d = sum(w * float(plain.gaps[i][n][t] - moved[t]) for n, w in r.prompt.teachers.items())
            advantage = scaled[i] + 0.5 * d
            num_clipped += ratio > 1.1 if advantage > 0 else ratio < 0.9
    assert 0 < num_clipped < num
    assert 0 < num_masked < num
    found = stats.policy(None)
    assert found is not None
    assert found.clipped_fraction == pytest.approx(num_clipped / num)
    assert found.corrected_fraction == pytest.approx(num_masked / num)
    assert found.importance_weight == pytest.approx(weights / num)


def test_a_mask_that_excludes_all_responses_keeps_the_exact_term(write_job: Write) -> None:
    """And nothing at all where there is none, without a NaN."""
    band = {"correction": {"kind": "mask", "low": 5e5, "high": 1e6}}
    exact = methods_parts(write_job, loss="reverse_kl")
    plain = Plain(exact)
    grades = rewards_of(plain.rollouts)
    alone = first_update(exact, plain.rollouts, grades)
    mixed = methods_parts(write_job, loss={"reverse_kl": 1.0, "outcome": 1.0}, **band)
    beside = first_update(mixed, plain.rollouts, grades)
    assert all(torch.equal(beside[name], alone[name]) for name in alone)
    for kind in ("mask", "sequence_mask"):
        band["correction"]["kind"] = kind
        policy = methods_parts(write_job, loss={"sampled_reverse_kl": 1.0, "outcome": 1.0}, **band)
        [(gradient, stats)] = engine_round(policy, plain.rollouts, grades)
        assert is_zero(gradient)
        found = stats.policy(None)
        assert found is not None
        assert (found.corrected_fraction, found.importance_weight) == (1.0, 0.0)


# Budgets


def test_pass_rates_weight_teacher_terms_only(write_job: Write) -> None:
    parts = methods_parts(
        write_job, loss={"reverse_kl": 1.0, "outcome": 0.5}, balance={"pass_rate": {"a": 1.0, "b": 2.0}}
    )
    plain = Plain(parts)
    grades = rewards_of(plain.rollouts)
    scaled = advantages(plain.rollouts, grades, "unbiased")
    total = torch.zeros((), dtype=torch.float64)
    for i, r in enumerate(plain.rollouts):
        group = [v for s, v in zip(plain.rollouts, grades, strict=True) if s.prompt.key == r.prompt.key]
        p = statistics.fmean(group)
        total = total + (p * (1 - p) ** 2 * plain.exact(i) - 0.5 * scaled[i] * plain.lp[i]).sum()
    expected = plain.gradient(total / plain.num_tokens())
    assert_equal(first_update(parts, plain.rollouts, grades), expected, 1e-10)


def test_prompts_with_equal_rewards_have_no_gradient(write_job: Write) -> None:
    parts = methods_parts(write_job, loss="reverse_kl", balance={"pass_rate": {}})
    plain = Plain(parts)
    for grade in (0.0, 1.0):
        assert is_zero(first_update(parts, plain.rollouts, [grade] * len(plain.rollouts)))


@pytest.mark.parametrize(
    ("reduce", "kind", "tokens"),
    [
        ("token", "exact", "off"),
        ("sequence", "exact", "equal"),
        ("token", "sampled", "equal"),
        ("sequence", "sampled", "off"),
    ],
)
def test_budgets_that_follow_the_gap(write_job: Write, reduce: str, kind: str, tokens: str) -> None:
    alpha = 1.5
    terms = {"exact": {"reverse_kl": 1.0}, "sampled": {"sampled_reverse_kl": 1.0}}[kind]
    parts = methods_parts(
        write_job,
        loss={**terms, "outcome": 0.5},
        reduce=reduce,
        balance={"follow_gap": alpha, "tokens": tokens},
    )
    plain = Plain(parts)
    grades = rewards_of(plain.rollouts)
    scaled = advantages(plain.rollouts, grades, "unbiased")
    domains, num = plain.domains(), len(plain.rollouts)
    shares, gaps = {}, {}
    for domain, members in domains.items():
        shares[domain] = (
            plain.num_tokens(members) / plain.num_tokens() if reduce == "token" else len(members) / num
        )
        apart = 0.0
        for i in members:
            for name, weight in plain.rollouts[i].prompt.teachers.items():
                one = plain.kl[i][name].detach() if kind == "exact" else plain.gaps[i][name].abs()
                apart += weight * float(one.sum())
        gaps[domain] = apart / plain.num_tokens(members)
    m1 = {d: 0.5 / shares[d] if tokens == "equal" else 1.0 for d in domains}
    mean = sum(m1[d] * gaps[d] for d in domains) / sum(m1.values())
    raw = {d: m1[d] * (gaps[d] / mean) ** alpha for d in domains}
    factors = {d: raw[d] / sum(raw[e] * shares[e] for e in domains) for d in domains}
    assert max(factors.values()) > 1.2
    total = torch.zeros((), dtype=torch.float64)
    for i, r in enumerate(plain.rollouts):
        teacher = plain.exact(i) if kind == "exact" else -plain.d(i) * plain.lp[i]
        losses = teacher - 0.5 * scaled[i] * plain.lp[i]
        one = losses.sum() / plain.num_tokens() if reduce == "token" else losses.mean() / num
        total = total + factors[r.prompt.domain] * one
    [(gradient, stats)] = engine_round(parts, plain.rollouts, grades)
    assert_equal(gradient, plain.gradient(total), 1e-10)
    assert stats.loss == pytest.approx(value_of(plain, factors, scaled, kind, reduce), rel=1e-9)


def value_of(
    plain: Plain, factors: dict[str, float], scaled: Sequence[float], kind: str, reduce: str
) -> float:
    """The loss that is shown: at ratio 1, minus the advantage."""
    total = 0.0
    for i, r in enumerate(plain.rollouts):
        teacher = plain.exact(i).detach() if kind == "exact" else -plain.d(i)
        losses = teacher - 0.5 * scaled[i]
        scale = plain.num_tokens() if reduce == "token" else len(plain.rollouts) * len(losses)
        total += factors[r.prompt.domain] * float(losses.sum()) / scale
    return total


@pytest.mark.parametrize("gain", [0.0, 0.5])
def test_ramps_move_with_the_updates_of_the_phase(write_job: Write, gain: float) -> None:
    """Two updates of one round under weights that stay: KDRL's fading teacher beside a growing outcome."""
    parts = methods_parts(
        write_job,
        loss={
            "reverse_kl": {"start": 1.0, "end": 0.5, "updates": 1},
            "sampled_reverse_kl": {"weight": {"start": 0.8, "end": 0.0, "updates": 4}, "early_gain": gain},
            "outcome": {"weight": {"start": 0.0, "end": 1.0, "updates": 2}},
        },
        updates_per_round=2,
    )
    plain = Plain(parts)
    grades = rewards_of(plain.rollouts)
    scaled = advantages(plain.rollouts, grades, "unbiased")
    found = engine_round(parts, plain.rollouts, grades)
    amounts = [(1.0, 0.8, 0.0), (0.5, 0.6, 0.5)]
    for update, (gradient, _), (exact, sampled, outcome) in zip(
        split_updates(plain.rollouts, 2), found, amounts, strict=True
    ):
        total = torch.zeros((), dtype=torch.float64)
        for i in update:
            advantage = sampled * plain.early(i, gain) + outcome * scaled[i]
            total = total + (exact * plain.exact(i) - advantage * plain.lp[i]).sum()
        assert_equal(gradient, plain.gradient(total / plain.num_tokens(update)), 1e-10)


def test_an_outcome_counts_once_for_any_number_of_teachers(write_job: Write) -> None:
    """Gradients add up: exact + outcome together, less exact alone, is the outcome without any teacher."""
    losses = ({"reverse_kl": 1.0, "outcome": 1.0}, {"reverse_kl": 1.0}, {"outcome": 1.0})
    plain, found = None, []
    for loss in losses:
        parts = methods_parts(write_job, loss=loss)
        plain = plain or Plain(parts)
        found.append(first_update(parts, plain.rollouts, rewards_of(plain.rollouts)))
    both, exact, outcome = found
    assert {len(r.prompt.teachers) for r in plain.rollouts} == {1, 2}  # type: ignore[union-attr]
    assert_equal({name: both[name] - exact[name] for name in both}, outcome, 1e-12)


# Sequences: MiniLLM is the gradient of the whole answers' divergence


@pytest.mark.parametrize("exact", [True, False])
def test_reward_to_go_gives_the_gradient_of_the_divergence_of_whole_responses(
    write_job: Write, exact: bool
) -> None:
    """`sum over y of p_S(y) log(p_S(y) / p_T(y))`, differentiated through everything.

    All answers are there, weighted by their probability; with the exact term for a token's own part
    (single-step decomposition) or the sampled one.
    """
    term = {"weight": 1.0, "discount": 1.0, "future_only": exact}
    loss = {"sampled_reverse_kl": term} | ({"reverse_kl": 1.0} if exact else {})
    parts = methods_parts(write_job, loss=loss)
    plain = Plain(parts)
    total, weighted = torch.zeros((), dtype=torch.float64), []
    for i, r in enumerate(plain.rollouts):
        probability = plain.lp[i].sum().exp()
        p = float(probability.detach())
        prompt = replace(r.prompt, teachers={n: w * p for n, w in r.prompt.teachers.items()})
        weighted.append(replace(r, prompt=prompt))
        for name, weight in r.prompt.teachers.items():
            log_t = (plain.gaps[i][name] + plain.lp[i].detach()).sum()
            total = total + weight * probability * (plain.lp[i].sum() - log_t)
    found = first_update(parts, weighted)
    assert_equal(found, plain.gradient(total / plain.num_tokens()), 1e-10)
