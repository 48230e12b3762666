"""A made-up contribution of a run, for tests of what shows one."""

from __future__ import annotations

from mergeopd.reporting.contribution import (
    Change,
    ChangedResponse,
    Contribution,
    DomainChange,
    StudentResponse,
    TeacherChange,
    TeacherContribution,
)
from mergeopd.reporting.result import Estimate


def change(base: float, merged: float, half: float = 0.05) -> Change:
    def around(value: float, low: float = -10.0) -> Estimate:
        return Estimate(value, max(value - half, low), value + half)

    return Change(around(base, 0.0), around(merged, 0.0), around(merged - base))


def teacher_change(scale: float, rest_share: float) -> TeacherChange:
    return TeacherChange(
        num_prompts=16,
        num_responses=64,
        num_tokens=1234,
        reverse_kl=change(scale, scale / 8),
        overlap=change(0.4, 0.9),
        logprob_gap=change(-scale, -scale / 8),
        teacher_logprob_gap=change(-scale / 2, -scale / 16),
        pass_rate=change(0.25, 0.75),
        pass_rate_T=Estimate(0.875, 0.8, 0.95),
        closed=Estimate(0.875, 0.8, 0.95),
        recovered=Estimate(0.8, 0.7, 0.9),
        rest_share=rest_share,
    )


def contribution(evil: str = "") -> Contribution:
    """Two teachers, of which one was not measured, three domains, four responses; `evil` is in every text."""
    by_domain = {"math": teacher_change(1.5, 0.75), "code": teacher_change(0.5, 0.25)}
    domains = (
        DomainChange("math", "math", "evaluation", True, 256, change(0.25, 0.75), change(100, 250, 9)),
        DomainChange("code", "code", "sample", True, 16, change(0.5, 0.52), change(40, 41, 9)),
        DomainChange(
            f"chat{evil}", "chat", "evaluation", False, 128, change(0.9, 0.6), refusals=change(0.01, 0.2)
        ),
    )
    responses = tuple(
        ChangedResponse(
            name=name,
            measured_on="evaluation",
            key=f"file:{i}",
            prompt=f"Question {i}?{evil}",
            reference=f"{i}{evil}" if i else None,
            change=lost,
            base=StudentResponse(f"base says {i}{evil}", 1.0 if i else 0.0, None, "eos", 12),
            merged=StudentResponse(f"merged says {i}{evil}", 1.0 - i / 2, evil or None, "length", 99),
        )
        for name in ("math", f"chat{evil}")
        for i, lost in ((1, -0.5), (0, 1.0))
    )
    return Contribution(
        version=1,
        run=f"runs/made{evil}",
        name=f"made up{evil}",
        plan_hash="0123456789abcdef",
        base=f"models/base{evil}",
        merged="runs/made/export",
        created="2026-01-02T03:04:05+00:00",
        settings={"prompts": 64, "samples": 4},
        summary=(f"the reverse KL went from 1 to 0.125 nats per token{evil}", "forgotten: chat (90% → 60%)"),
        teachers=(
            TeacherContribution(
                "expert", "models/expert", by_domain["math"], by_domain, notes=(f"a note{evil}",)
            ),
            TeacherContribution("lost", "models/lost", fault=f"cannot be read: no such folder{evil}"),
        ),
        domains=domains,
        forgotten=("chat",),
        responses=responses,
        notes=(f"`models/expert` has other contents{evil}",),
        seconds={"rollout": 1.5, "total": 3.0},
    )
