"""The objective is exact where terms and phases have teachers of their own: all answers, against autograd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from enumeration import (
    Plain,
    Reference,
    advantages,
    assert_equal,
    build_parts,
    divergences,
    engine_round,
    first_update,
    methods_parts,
    rewards_of,
    rollout_logprobs,
    rollouts_of,
)

ROUTED = {"left": {"one": 1.0, "two": 0.5}, "right": {"two": 0.7}}
LOSS = {
    "reverse_kl": 0.8,
    "forward_kl": {"teachers": {"two": 0.5}, "weight": 0.3},
    "tvd": {"teachers": ["one"], "weight": {"start": 0.4, "end": 0.4, "updates": 1}},
}
OF_TERMS = {"forward_kl": {"two": 0.5 * 0.3}, "tvd": {"one": 0.4}}


@pytest.mark.parametrize("micro_batch_tokens", [1, 23, 100_000])
def test_terms_with_teachers_of_their_own_have_the_gradient_of_autograd(
    write_job: Callable[..., Path], micro_batch_tokens: int
) -> None:
    parts = build_parts(
        write_job, f"student.micro_batch_tokens={micro_batch_tokens}", text="student", loss=LOSS
    )
    reference = Reference(parts)
    rollouts = rollouts_of(parts, reference)
    students = rollout_logprobs(reference.student, rollouts, 1.0)
    total = torch.zeros((), dtype=torch.float64)
    for rollout, log_s, log_t in zip(
        rollouts, students, reference.teacher_logprobs(rollouts, 1.0), strict=True
    ):
        assert log_t.keys() == {"one", "two"}  # `one` also where it is not routed
        by_term = {"reverse_kl": {n: 0.8 * w for n, w in ROUTED[rollout.prompt.source].items()}, **OF_TERMS}
        for term, weights in by_term.items():
            for name, weight in weights.items():
                total = total + weight * divergences({term: 1.0}, log_s, log_t[name]).sum()
    num_tokens = sum(len(r.response_ids) for r in rollouts)
    [(found, stats)] = engine_round(parts, rollouts)
    assert_equal(found, reference.gradient(total / num_tokens))
    assert stats.loss == pytest.approx(float(total.detach()) / num_tokens, rel=1e-12)


def test_a_sampled_term_and_a_reference_have_separate_teachers(write_job: Callable[..., Path]) -> None:
    """Sampled reverse KL to `one` on every prompt, exact KL to the routed teachers, outcome beside both."""
    loss = {"outcome": 1.0, "sampled_reverse_kl": {"teachers": "one", "weight": 0.3}, "reverse_kl": 0.1}
    parts = methods_parts(write_job, loss=loss, clip_ratio=None)
    plain = Plain(parts)
    rewards = rewards_of(plain.rollouts)
    found = first_update(parts, plain.rollouts, rewards)
    total = torch.zeros((), dtype=torch.float64)
    for i, (rollout, advantage) in enumerate(
        zip(plain.rollouts, advantages(plain.rollouts, rewards, "unbiased"), strict=True)
    ):
        total = total - ((advantage + 0.3 * plain.gaps[i]["one"]) * plain.lp[i]).sum()
        for name, weight in ROUTED[rollout.prompt.source].items():
            total = total + 0.1 * weight * plain.kl[i][name].sum()
    assert_equal(found, plain.gradient(total / plain.num_tokens()), 1e-10)


def test_the_ratio_keeps_the_routed_teachers_beside_a_reference(write_job: Callable[..., Path]) -> None:
    """RLAD with a KL to a reference: `one` is in the KL alone, so the ratio has `two` alone."""
    loss = {
        "outcome": {"teacher": {"kind": "trust_region", "alpha": 0.5}},
        "reverse_kl": {"teachers": "one", "weight": 0.2},
    }
    parts = methods_parts(
        write_job, "prompts.0.teachers=two", loss=loss, clip_ratio={"low": 0.9, "high": 9.0}
    )
    plain = Plain(parts)
    rewards = rewards_of(plain.rollouts)
    found = first_update(parts, plain.rollouts, rewards)
    total = torch.zeros((), dtype=torch.float64)
    for i, advantage in enumerate(advantages(plain.rollouts, rewards, "unbiased")):
        log_ratio = plain.lp[i] - plain.lp[i].detach() - 0.5 * plain.gaps[i]["two"]
        ratio = log_ratio.exp()
        value = torch.minimum(ratio * advantage, ratio.clamp(0.1, 10.0) * advantage)
        total = total - value.sum() + 0.2 * plain.kl[i]["one"].sum()
    assert_equal(found, plain.gradient(total / plain.num_tokens()), 1e-10)


def test_a_phase_selects_among_the_teachers_of_its_sources(write_job: Callable[..., Path]) -> None:
    loss = {"reverse_kl": 1.0}
    parts = build_parts(write_job, text="student", loss=loss, teachers={"two": 2.0, "one": 0.3})
    reference = Reference(parts)
    rollouts = rollouts_of(parts, reference)
    students = rollout_logprobs(reference.student, rollouts, 1.0)
    total = torch.zeros((), dtype=torch.float64)
    for rollout, log_s, log_t in zip(
        rollouts, students, reference.teacher_logprobs(rollouts, 1.0), strict=True
    ):
        for name, weight in ROUTED[rollout.prompt.source].items():
            own = {"two": 2.0, "one": 0.3}[name] * weight
            total = total + own * divergences(loss, log_s, log_t[name]).sum()
    [(found, _)] = engine_round(parts, rollouts)
    assert_equal(found, reference.gradient(total / sum(len(r.response_ids) for r in rollouts)))
