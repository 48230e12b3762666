"""Expected shares of the domains in the loss, and what `balance` of the recipe makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mergeopd.batch.weights import follow_gap, token_share_weights
from mergeopd.inspection.signal import Graded, num_frontier, pass_rate, truncated_fraction
from mergeopd.messages import joined
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.training import Phase
from mergeopd.reporting.inspection import DomainBudget


@dataclass(frozen=True, slots=True)
class DomainSample:
    """The student's responses in a domain: their mean number of tokens in the loss, and how they count.

    `gap` is the mean reverse KL per token, summed over the teachers with their weights; None without.
    """

    mean_length: float
    graded: Sequence[Graded]
    gap: float | None = None


def domain_budgets(plan: Plan, samples: Mapping[str, DomainSample]) -> tuple[DomainBudget, ...]:
    """Return the budget of every domain; none if the phases draw from a domain without a sample.

    Shares are means over the phases, each with the number of its updates.
    """
    domains = list(dict.fromkeys(s.domain for phase in plan.phases for s in plan.sources_of(phase)))
    if not set(domains) <= samples.keys():
        return ()
    totals = {domain: np.zeros(3) for domain in domains}
    prompts = dict.fromkeys(domains, 0.0)
    for phase in plan.phases:
        shares = _prompt_shares(plan, phase)
        tokens = _normal({domain: share * samples[domain].mean_length for domain, share in shares.items()})
        balanced = _balanced(phase, shares if phase.reduce == "sequence" else tokens, samples)
        for domain, share in shares.items():
            totals[domain] += phase.updates * np.array([share, tokens[domain], balanced[domain]])
            prompts[domain] += phase.num_prompts * share
    return tuple(
        DomainBudget(
            domain=domain,
            num_prompts=round(prompts[domain]),
            share=float(totals[domain][0] / plan.num_updates),
            mean_length=samples[domain].mean_length,
            token_share=float(totals[domain][1] / plan.num_updates),
            balanced_share=float(totals[domain][2] / plan.num_updates),
            pass_rate=pass_rate(samples[domain].graded),
            num_frontier=num_frontier(samples[domain].graded),
            truncated_fraction=truncated_fraction(samples[domain].graded) or 0.0,
        )
        for domain in domains
    )


def unknown_gaps(plan: Plan, samples: Mapping[str, DomainSample]) -> tuple[str, ...]:
    """Return a note for each phase whose `follow_gap` a budget leaves out, as a domain's gap is not known."""
    notes = []
    for phase in plan.phases:
        own = dict.fromkeys(source.domain for source in plan.sources_of(phase))
        unknown = [name for name in own if name in samples and samples[name].gap is None]
        if phase.balance.follow_gap and unknown:
            names = joined([repr(name) for name in unknown], "and")
            notes.append(
                f"the shares of phase '{phase.name}' leave out `follow_gap`: no gap is known of {names}"
            )
    return tuple(notes)


def _prompt_shares(plan: Plan, phase: Phase) -> dict[str, float]:
    """Return the share of a phase's prompts of each domain."""
    shares, by_domain = plan.shares(phase), dict[str, float]()
    for source in plan.sources_of(phase):
        by_domain[source.domain] = by_domain.get(source.domain, 0.0) + shares[source.name]
    return _normal(by_domain)


def _balanced(
    phase: Phase, mass: Mapping[str, float], samples: Mapping[str, DomainSample]
) -> dict[str, float]:
    """Return the shares of the loss after the factors of the phase's `balance`."""
    balance = phase.balance
    factors = dict.fromkeys((domain for domain, share in mass.items() if share > 0), 1.0)
    if balance.tokens != "off":
        factors = token_share_weights(mass, None if balance.tokens == "equal" else balance.tokens)
    gaps = {domain: samples[domain].gap for domain in factors}
    if balance.follow_gap and all(gap is not None for gap in gaps.values()):
        known = {domain: gap or 0.0 for domain, gap in gaps.items()}
        factors = follow_gap(factors, mass, known, balance.follow_gap)
    return _normal({domain: share * factors.get(domain, 0.0) for domain, share in mass.items()})


def _normal(shares: Mapping[str, float]) -> dict[str, float]:
    total = sum(shares.values())
    return {name: share / total if total else 0.0 for name, share in shares.items()}
