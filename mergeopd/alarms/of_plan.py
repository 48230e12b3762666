"""Choose the detectors of a plan's alarms, and what each of them watches."""

from __future__ import annotations

from mergeopd.alarms.agreement import (
    EntropyGapRisingDetector,
    LowSharedMassDetector,
    SharedMassFallingDetector,
)
from mergeopd.alarms.detectors import (
    DeadDomainDetector,
    Detector,
    DivergenceRisingDetector,
    EntropyCollapseDetector,
    FirstGapDetector,
    GradientSpikeDetector,
    HighShareDetector,
    IdenticalTeacherDetector,
    LengthCollapseDetector,
    RolloutGapDetector,
    StarvedDomainDetector,
    ZeroGradientDetector,
)
from mergeopd.recipe.plan import Plan


def _teachers_of(plan: Plan, domain: str) -> list[str]:
    """Return the teachers that score responses of a domain in some phase."""
    names: set[str] = set()
    for phase in plan.phases:
        sources = [source.name for source in plan.sources_of(phase) if source.domain == domain]
        names |= plan.teachers_of(phase).scoring(sources) if sources else set()
    return sorted(names)


def detectors_of(plan: Plan) -> dict[str, Detector]:
    """Return the detectors of a plan's alarms, by name."""
    alarms = plan.alarms
    domains = sorted({source.domain for source in plan.sources})
    experts = [name for name, teacher in plan.teachers.items() if teacher.student is None]
    of_domain = {domain: _teachers_of(plan, domain) for domain in domains}
    # A domain whose only teacher is the student itself need not improve, unless it has an outcome term.
    has_outcome = any(phase.loss.outcome is not None for phase in plan.phases)
    learning = [d for d in domains if has_outcome or any(t in experts for t in of_domain[d])]
    mismatch, cold = alarms.mismatched_teacher, alarms.no_cold_start
    return {
        "zero_gradient": ZeroGradientDetector(alarms.zero_gradient),
        "gradient_spike": GradientSpikeDetector(alarms.gradient_spike),
        "divergence_rising": DivergenceRisingDetector(alarms.divergence_rising, experts),
        "entropy_collapse": EntropyCollapseDetector(
            alarms.entropy_collapse, {d: [t for t in own if t in experts] for d, own in of_domain.items()}
        ),
        "length_collapse": LengthCollapseDetector(
            alarms.length_collapse, {p.name: plan.rollout_of(p).max_new_tokens for p in plan.phases}
        ),
        "truncation": HighShareDetector(
            alarms.truncation, "truncated_fraction", "responses end at the length limit"
        ),
        "repetition": HighShareDetector(
            alarms.repetition, "repetition", "4-grams occurred earlier in their response"
        ),
        "dead_domain": DeadDomainDetector(alarms.dead_domain, learning),
        "starved_domain": StarvedDomainDetector(
            alarms.starved_domain,
            {p.name: frozenset(s.domain for s in plan.sources_of(p)) for p in plan.phases},
        ),
        "rollout_gap": RolloutGapDetector(alarms.rollout_gap),
        "identical_teacher": IdenticalTeacherDetector(alarms.identical_teacher, experts),
        "mismatched_teacher": FirstGapDetector(
            mismatch,
            experts,
            figure="logprob_gap_text",
            is_far=lambda gap: abs(gap) > mismatch.nats,
            limit=f"+-{mismatch.nats:g}",
        ),
        "no_cold_start": FirstGapDetector(
            cold,
            experts,
            figure="logprob_gap_student",
            is_far=lambda gap: gap < -cold.nats,
            limit=f"-{cold.nats:g}",
        ),
        "low_shared_mass": LowSharedMassDetector(experts, alarms.low_shared_mass),
        "shared_mass_falling": SharedMassFallingDetector(experts, alarms.shared_mass_falling),
        "entropy_gap_rising": EntropyGapRisingDetector(experts, alarms.entropy_gap_rising),
    }
