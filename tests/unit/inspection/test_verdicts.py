"""Verdicts: a signal for each, thresholds on both sides, and the order of the rules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mergeopd.inspection.verdicts import over_domains, verdict_of
from mergeopd.recipe.inspection import InspectionSettings, InspectionThresholds
from mergeopd.reporting.inspection import Compatibility, Finding, Onset, Rendering, Signal, Verdict
from mergeopd.reporting.result import Estimate

LIMITS = InspectionThresholds()


def about(value: float | None, spread: float = 0.05) -> Estimate:
    return Estimate(None) if value is None else Estimate(value, value - spread, value + spread)


GOOD = Signal(
    num_prompts=16,
    num_responses=64,
    num_tokens=640,
    k=16,
    overlap=about(0.7),
    overlap_advantage=about(-0.05),
    entropy_gap=about(0.2),
    entropy_S=about(0.5),
    entropy_T=about(0.1),
    shared_mass_S=about(0.98, 0.01),
    shared_mass_T=about(0.99, 0.005),
    reverse_kl=about(0.8),
    forward_kl=about(0.4),
    logprob_gap=about(-0.7),
    pass_rate_S=about(0.3),
    pass_rate_T=about(0.9),
    teacher_logprob_gap=about(-0.4),
    num_frontier=6,
    first_token_kl=about(0.4),
    own_entropy_T=about(0.05, 0.01),
    pass_gain=about(0.6),
    max_entropy=6.0,
    foreign_ends=0.0,
    truncated_S=0.0,
    truncated_T=0.0,
    onset=Onset(8, 0.05, 0.06, 300, 300),
)


def rendering(pass_rate: float | None, first: float) -> Rendering:
    return Rendering("the student's template", about(pass_rate), about(0.5), about(first))


CASES = {
    "good": ("ready", {}),
    "uniform": (
        "wrong_teacher",
        {"own_entropy_T": about(5.5), "pass_rate_T": about(0.0), "pass_gain": about(-0.3)},
    ),
    "the student": ("nothing_new", {"reverse_kl": about(0.0001)}),
    "wrong template": (
        "template_mismatch",
        {"pass_rate_T": about(0.1), "pass_gain": about(-0.2), "renderings": (rendering(0.9, 0.4),)},
    ),
    "thinking": ("template_mismatch", {"first_token_kl": about(9.0), "renderings": (rendering(0.88, 0.5),)}),
    "thinking, and a little worse without": (
        "template_mismatch",
        {"first_token_kl": about(9.0), "renderings": (rendering(0.8, 0.01),)},
    ),
    "its own system prompt": ("ready", {"first_token_kl": about(3.0), "renderings": (rendering(0.2, 0.1),)}),
    "other ends": ("template_mismatch", {"foreign_ends": 1.0}),
    "never ends": ("template_mismatch", {"truncated_T": 1.0, "pass_rate_T": about(0.0)}),
    "nobody ends": ("ready", {"truncated_T": 0.8, "truncated_S": 0.8}),
    "noisy": ("noisy", {"onset": Onset(20, 0.05, 1.5, 300, 300), "pass_rate_T": about(0.0)}),
    "calmer later": ("ready", {"onset": Onset(20, 1.5, 0.05, 300, 300)}),
    "other domain": (
        "wrong_teacher",
        {"pass_rate_T": about(0.02), "pass_gain": about(-0.28), "teacher_logprob_gap": about(-5.0)},
    ),
    "weak generalist": ("nothing_new", {"pass_rate_T": about(0.02), "pass_gain": about(-0.28)}),
    "other domain, endless": (
        "wrong_teacher",
        {
            "pass_rate_T": about(0.0),
            "pass_gain": about(-0.3),
            "teacher_logprob_gap": about(-5.0),
            "truncated_T": 1.0,
        },
    ),
    "weaker": ("nothing_new", {"pass_rate_T": about(0.25), "pass_gain": about(-0.05)}),
    "far": (
        "cold_start",
        {"pass_rate_S": about(0.0), "teacher_logprob_gap": about(-2.0), "overlap": about(0.45)},
    ),
    "low overlap alone": ("ready", {"overlap": about(0.1)}),
    "no verifier": (
        "unknown",
        {"pass_rate_S": about(None), "pass_rate_T": about(None), "pass_gain": about(None)},
    ),
    "no tokens": ("unknown", {"num_tokens": 0}),
}


@pytest.mark.parametrize(("kind", "changes"), CASES.values(), ids=CASES)
def test_verdicts(kind: str, changes: dict[str, object]) -> None:
    verdict = verdict_of(replace(GOOD, **changes), LIMITS)
    assert verdict.kind == kind
    assert verdict.beyond == (20 if kind == "noisy" else None)
    if verdict.kind != "ready" and changes != {"num_tokens": 0}:
        assert verdict.remedy
    for reason in verdict.reasons:
        assert hasattr(LIMITS, reason.threshold)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "ready"),  # its own template is the right one for it
        ({"pass_rate_T": about(0.02), "pass_gain": about(-0.28)}, "template_mismatch"),
        ({"pass_gain": about(None), "first_token_kl": about(5.0)}, "template_mismatch"),
        ({"pass_gain": about(None)}, "unknown"),
    ],
)
def test_a_problem_of_the_template_explains_a_teacher_that_fails(
    changes: dict[str, object], kind: str
) -> None:
    finding = Finding("template", "problem", "responses begin in the reasoning", "set `enable_thinking`")
    verdict = verdict_of(replace(GOOD, **changes), LIMITS, Compatibility((finding,)))
    assert verdict.kind == kind
    if kind == "template_mismatch":
        assert "begin in the reasoning" in verdict.sentence
        assert verdict.remedy == "set `enable_thinking`"
        note = replace(finding, level="note")
        assert verdict_of(replace(GOOD, **changes), LIMITS, Compatibility((note,))).kind != kind


def test_no_verdict_rests_on_overlap_alone() -> None:
    for overlap in (0.0, 0.5, 1.0):
        verdict = verdict_of(replace(GOOD, overlap=about(overlap)), LIMITS)
        assert verdict.kind == "ready"
        assert not [reason for reason in verdict.reasons if "overlap" in reason.text]


def test_thresholds_can_be_set_and_are_shown() -> None:
    strict = InspectionThresholds(pass_margin=0.7)
    verdict = verdict_of(GOOD, strict)
    assert verdict.kind == "nothing_new"
    [reason] = verdict.reasons
    assert (reason.threshold, reason.limit, reason.is_met) == ("pass_margin", 0.7, True)
    assert reason.value == pytest.approx(0.6)
    values = InspectionSettings(thresholds=strict).values
    assert values["pass_margin"] == 0.7
    assert values["prompts"] == 64


def test_a_teacher_of_several_domains_has_the_gravest_verdict() -> None:
    pooled = Verdict("ready", "can teach")
    by_domain = {"a": Verdict("ready", "can teach"), "b": Verdict("wrong_teacher", "solves 0%")}
    verdict = over_domains(pooled, by_domain)
    assert verdict.kind == "wrong_teacher"
    assert verdict.sentence == "for b: solves 0%; ready for a"
    assert over_domains(pooled, {"a": by_domain["a"]}) is pooled
