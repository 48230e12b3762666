"""Who gets a policy gradient, and rounds in which there is little or nothing to learn, through the whole path.

As in test_policy_path, against plain arithmetic; where nothing is to be learnt, the gradient is exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from enumeration import (
    Plain,
    Reference,
    advantages,
    assert_equal,
    engine_round,
    first_update,
    is_zero,
    methods_parts,
    rewards_of,
    rollouts_of,
)

from mergeopd.engine.models import Models
from mergeopd.engine.schedule import split_updates
from mergeopd.teacher.token_view import SameTokens
from mergeopd.types import Rollout

Write = Callable[..., Path]


def test_off_policy_responses_have_divergences_but_no_policy_term(write_job: Write) -> None:
    """Of a mixture: every fourth answer is the dataset's, every fourth a teacher's. Denominators count all."""
    parts = methods_parts(
        write_job,
        text={"on_policy_fraction": 0.5, "otherwise": "dataset"},
        loss={"reverse_kl": 1.0, "sampled_reverse_kl": 0.5, "outcome": 1.0},
        correction={"kind": "truncate", "high": 1.5},
    )
    plain = Plain(parts)
    mixed: list[Rollout] = []
    for i, r in enumerate(plain.rollouts):
        origin = ("student", "dataset", "student", "teacher")[i % 4]
        mixed.append(r if origin == "student" else replace(r, origin=origin, logprobs_behaviour=None))  # type: ignore[arg-type]
    own = [i for i, r in enumerate(mixed) if r.origin == "student"]
    grades = rewards_of(mixed)
    mine = advantages([mixed[i] for i in own], [grades[i] for i in own], "unbiased")
    total = torch.stack([plain.exact(i).sum() for i in range(len(mixed))]).sum()
    for i, a in zip(own, mine, strict=True):
        total = total - (plain.rho(i).clamp(max=1.5) * (0.5 * plain.d(i) + a) * plain.lp[i]).sum()
    [(gradient, stats)] = engine_round(parts, mixed, grades)
    assert_equal(gradient, plain.gradient(total / plain.num_tokens()), 1e-10)
    rho = torch.cat([plain.rho(i) for i in own])
    found = stats.policy(None)
    assert found is not None
    assert found.importance_weight == pytest.approx(float(rho.clamp(max=1.5).mean()))
    assert found.corrected_fraction == pytest.approx(float((rho > 1.5).double().mean()))
    assert found.rollout_logprob_gap == pytest.approx(float(rho.log().abs().mean()))
    assert found.rollout_logprob_gap_max == pytest.approx(float(rho.log().abs().max()))
    # Log-prob gaps, of each teacher's tokens by their origin.
    for name, figures in stats.teachers(parts.views).items():
        taught = [i for i, r in enumerate(mixed) if name in r.prompt.teachers]
        for who, mean in (("student", figures.logprob_gap_student), ("text", figures.logprob_gap_text)):
            of_origin = [
                plain.gaps[i][name] for i in taught if (mixed[i].origin == "student") == (who == "student")
            ]
            assert mean == (pytest.approx(float(torch.cat(of_origin).mean())) if of_origin else None)
        assert figures.logprob_gap == pytest.approx(
            float(torch.cat([plain.gaps[i][name] for i in taught]).mean())
        )
    # What a verifier thinks of the others' answers is nobody's business.
    others = [v if r.origin == "student" else 1.0 - v for r, v in zip(mixed, grades, strict=True)]
    again = first_update(parts, mixed, others)
    assert all(torch.equal(again[name], gradient[name]) for name in gradient)


def test_truncated_responses_have_teacher_terms_but_no_outcome(write_job: Write) -> None:
    parts = methods_parts(write_job, loss={"reverse_kl": 1.0, "outcome": 1.0})
    plain = Plain(parts)
    grades = rewards_of(plain.rollouts)
    cut = [r.finish == "length" for r in plain.rollouts]
    assert 0 < sum(cut) < len(cut)
    found = first_update(parts, plain.rollouts, grades)
    # Their verdicts move nothing, neither their own advantage nor the group's mean.
    other = [1.0 - v if is_cut else v for v, is_cut in zip(grades, cut, strict=True)]
    again = first_update(parts, plain.rollouts, other)
    assert all(torch.equal(again[name], found[name]) for name in found)
    scaled = advantages(plain.rollouts, grades, "unbiased")
    total = torch.zeros((), dtype=torch.float64)
    for i, is_cut in enumerate(cut):
        total = total + (plain.exact(i) - (0.0 if is_cut else scaled[i]) * plain.lp[i]).sum()
    assert_equal(found, plain.gradient(total / plain.num_tokens()), 1e-10)


def with_other_eos(parts: Models, name: str) -> Models:
    """As if this teacher ended its answers with another token."""
    teachers = {n: replace(d, eos_ids=(3,)) if n == name else d for n, d in parts.inputs.teachers.items()}
    views = {n: SameTokens(renderer, parts.inputs.student) for n, renderer in teachers.items()}
    return replace(parts, inputs=replace(parts.inputs, teachers=teachers), views=views)


@pytest.mark.parametrize(
    "term",
    [{"weight": 1.0}, {"weight": 1.0, "discount": 0.5}, {"weight": 1.0, "early_gain": 0.5}],
    ids=["plain", "discount", "early"],
)
def test_end_tokens_that_a_teacher_does_not_use_are_masked(write_job: Write, term: dict) -> None:
    """The last token's gap counts nowhere: not there, not before it, not in the budget. The outcome does."""
    parts = with_other_eos(
        methods_parts(
            write_job, loss={"sampled_reverse_kl": term, "outcome": 0.5}, balance={"follow_gap": 1.0}
        ),
        "two",
    )
    plain = Plain(parts)
    grades = rewards_of(plain.rollouts)
    scaled = advantages(plain.rollouts, grades, "unbiased")
    for i, r in enumerate(plain.rollouts):
        if r.response_ids[-1] == 4:
            plain.gaps[i]["two"][-1] = 0.0
    domains = plain.domains()
    gaps = {
        d: sum(
            w * float(plain.gaps[i][n].abs().sum())
            for i in members
            for n, w in plain.rollouts[i].prompt.teachers.items()
        )
        / plain.num_tokens(members)
        for d, members in domains.items()
    }
    share = {d: plain.num_tokens(members) / plain.num_tokens() for d, members in domains.items()}
    factors = {d: gaps[d] / sum(gaps[e] * share[e] for e in domains) for d in domains}
    total = torch.zeros((), dtype=torch.float64)
    for i, r in enumerate(plain.rollouts):
        advantage = torch.full((len(r.response_ids),), 0.5 * scaled[i], dtype=torch.float64)
        for name, weight in r.prompt.teachers.items():
            gap = plain.gaps[i][name]
            for t in range(len(gap)):
                if "discount" in term:
                    credit = sum(0.5 ** (u - t) * float(gap[u]) for u in range(t, len(gap)))
                    if t == len(gap) - 1 and name == "two" and r.response_ids[-1] == 4:
                        credit = 0.0
                elif "early_gain" in term:
                    size = float(gap.abs().sum())
                    before = float(gap[:t].abs().sum()) / size if size else 0.0
                    credit = (1 + 0.5 * (1 - before)) * float(gap[t])
                else:
                    credit = float(gap[t])
                advantage[t] += weight * credit
        total = total - factors[r.prompt.domain] * (advantage * plain.lp[i]).sum()
    found = first_update(parts, plain.rollouts, grades)
    assert_equal(found, plain.gradient(total / plain.num_tokens()), 1e-10)


# Degenerate rounds


@pytest.mark.parametrize(
    "term",
    [{"std": "unbiased"}, {"std": "biased"}, {"std": "none"}]
    + [{"teacher": {"kind": kind}} for kind in ("trust_region", "credit")],
)
def test_groups_with_equal_rewards_have_no_gradient(write_job: Write, term: dict) -> None:
    parts = methods_parts(write_job, loss={"outcome": {"weight": 1.0, **term}})
    rollouts = rollouts_of(parts, Reference(parts))
    for grade in (0.0, 1.0, None):
        assert is_zero(first_update(parts, rollouts, [grade] * len(rollouts)))


def test_a_group_of_one_after_cutting_keeps_its_teacher_only(write_job: Write) -> None:
    parts = methods_parts(write_job, loss={"outcome": 1.0, "sampled_reverse_kl": 0.5})
    plain = Plain(parts)
    rollouts = [r if r.sample == 7 else replace(r, finish="length") for r in plain.rollouts]  # type: ignore[arg-type]
    found = first_update(parts, rollouts, rewards_of(rollouts))
    total = sum(-0.5 * (plain.d(i) * lp).sum() for i, lp in enumerate(plain.lp)) / plain.num_tokens()
    assert_equal(found, plain.gradient(total), 1e-10)  # type: ignore[arg-type]


def test_empty_responses_have_no_effect(write_job: Write) -> None:
    """They are in their group, though: an empty answer may be wrong."""
    parts = methods_parts(
        write_job,
        loss={"reverse_kl": 1.0, "outcome": 1.0, "sampled_reverse_kl": {"weight": 1.0, "early_gain": 0.5}},
        correction={"kind": "sequence_mask", "low": 0.8, "high": 1.3},
        reduce="sequence",
        balance={"follow_gap": 1.0, "tokens": "equal"},
    )
    rollouts = rollouts_of(parts, Reference(parts))
    grades: list[float | None] = [*rewards_of(rollouts)]
    empty = replace(rollouts[0], response_ids=(), logprobs_behaviour=(), finish="stop", sample=99)
    plain = first_update(parts, rollouts, grades)
    beside = first_update(parts, [*rollouts, empty], [*grades, None])
    for name, gradient in plain.items():
        assert torch.allclose(beside[name], gradient, rtol=1e-9, atol=1e-13)
    judged = first_update(parts, [*rollouts, empty], [*grades, 0.0])
    assert any(not torch.allclose(judged[name], plain[name]) for name in plain)
    nothing = [replace(empty, sample=i) for i in range(4)]
    parts_again = methods_parts(write_job, loss={"outcome": 1.0, "sampled_reverse_kl": 1.0})
    [(gradient, stats)] = engine_round(parts_again, nothing, [1.0, 0.0, 0.0, 1.0])
    assert is_zero(gradient)
    found = stats.policy(None)
    assert found is not None
    assert found.importance_weight == found.rollout_logprob_gap_max == 0.0


@pytest.mark.parametrize("num_updates", [1, 2])
def test_an_update_without_student_responses_has_no_policy_gradient(
    write_job: Write, num_updates: int
) -> None:
    """Also where the round's other update has some: then the old policy is known for half of the round."""
    parts = methods_parts(
        write_job,
        text={"on_policy_fraction": 0.5, "otherwise": "dataset"},
        loss={"outcome": 1.0, "sampled_reverse_kl": {"weight": 1.0, "early_gain": 0.5}},
        updates_per_round=num_updates,
    )
    rollouts = rollouts_of(parts, Reference(parts))
    updates = split_updates(rollouts, num_updates)
    foreign = set(updates[0])
    mixed = [
        replace(r, origin="dataset", logprobs_behaviour=None) if i in foreign else r
        for i, r in enumerate(rollouts)
    ]
    found = engine_round(parts, mixed, rewards_of(mixed))
    assert is_zero(found[0][0])
    statistics_ = found[0][1].policy(None)
    assert statistics_ is not None
    assert statistics_.importance_weight == statistics_.rollout_logprob_gap == 0.0
    if num_updates == 2:
        assert not is_zero(found[1][0])
