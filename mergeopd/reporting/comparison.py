"""Build a result from the rewards of an evaluation: intervals, comparisons and a verdict in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mergeopd.intervals import Values, difference_interval, paired_interval, wilson
from mergeopd.messages import joined
from mergeopd.reporting.result import Estimate, Model, Result, SuiteResult

Scores = Mapping[str, Mapping[str, Values]]


@dataclass(frozen=True, slots=True)
class Measured:
    """What an evaluation measured.

    `scores` has the mean reward of each prompt, by model key and domain. `experts` maps each domain to the
    key of its expert, `overlap` to the number of its prompts that are also trained on. Models may lack
    domains; the base, each domain's expert and `merged` have been measured. `trained_tokens` are those of
    `Result`.
    """

    models: tuple[Model, ...]
    scores: Scores
    experts: Mapping[str, str]
    overlap: Mapping[str, int]
    trained_tokens: Mapping[str, int] = field(default_factory=dict)


def build_result(measured: Measured, seconds: Mapping[str, float]) -> Result:
    """Build the result of a run that took `seconds` by stage."""
    models, scores, experts = measured.models, measured.scores, measured.experts
    domains = tuple(experts)
    best = {
        kind: max(
            (m.key for m in models if m.kind == kind and scores[m.key].keys() >= experts.keys()),
            key=lambda key: sum(float(scores[key][d].mean()) for d in domains),
            default=None,
        )
        for kind in ("static_merge", "expert", "control")
    }
    static, control = best["static_merge"], best["control"]
    controls = {m.key: m.title for m in models if m.kind == "control"}
    rows = {
        d: _domain(d, experts[d], static, tuple(controls), scores, measured.overlap.get(d, 0))
        for d in domains
    }
    with_headroom = [d for d in domains if rows[d].recovered.value is not None]
    mean = {
        kind: _mean([scores[key if kind != "expert" else experts[d]][d] for d in domains])
        for kind, key in (
            *(("base", "base"), ("expert", ""), ("static_merge", static), ("control", control)),
            ("merged", "merged"),
        )
        if key is not None
    }
    return Result(
        models=tuple(models),
        suites=rows,
        mean=mean,  # type: ignore[arg-type]
        mean_recovered=_recovered([_triple(scores, d, experts[d]) for d in with_headroom]),
        best_static=static,
        best_expert=best["expert"],
        best_control=control,
        verdict=_verdict(rows, controls),
        seconds=dict(seconds),
        trained_tokens=dict(measured.trained_tokens),
    )


def _domain(
    domain: str, expert: str, static: str | None, controls: Sequence[str], scores: Scores, overlap: int
) -> SuiteResult:
    own = {key: by_domain[domain] for key, by_domain in scores.items() if domain in by_domain}
    merged = own["merged"]
    return SuiteResult(
        expert=expert,
        num_prompts=len(merged),
        accuracy={key: mean_reward(values) for key, values in own.items()},
        recovered=_recovered([_triple(scores, domain, expert)]),
        over_base=_difference(merged, own["base"]),
        over_expert=_difference(merged, own[expert]),
        over_static=None if static is None else _difference(merged, own[static]),
        overlap=overlap,
        over_control={key: _difference(merged, own[key]) for key in controls if key in own},
    )


def _triple(scores: Scores, domain: str, expert: str) -> list[Values]:
    return [scores[key][domain] for key in ("base", expert, "merged")]


def mean_reward(values: Values) -> Estimate:
    """Return an accuracy from the mean reward of each prompt."""
    interval = wilson(values)
    return Estimate(float(values.mean()), interval.low, interval.high)


def _estimate(
    value: float | None, domains: Sequence[Sequence[Values]], statistic: Callable[[Values], Values]
) -> Estimate:
    interval = None if value is None else paired_interval(domains, statistic)
    return Estimate(value) if interval is None else Estimate(value, interval.low, interval.high)


def _mean(values: Sequence[Values]) -> Estimate:
    mean = float(np.mean([v.mean() for v in values]))
    return _estimate(mean, [[v] for v in values], lambda means: means[:, :, 0].mean(1))


def _difference(merged: Values, other: Values) -> Estimate:
    interval = difference_interval(merged, other)
    return Estimate(float(merged.mean() - other.mean()), interval.low, interval.high)


def _recovered(domains: Sequence[Sequence[Values]]) -> Estimate:
    """Return the mean recovered headroom; not defined where an expert is not better than the base."""
    if not domains:
        return Estimate(None)
    means = np.array([[[v.mean() for v in models] for models in domains]])
    value = float(_recovered_of(means)[0])
    return _estimate(None if np.isnan(value) else value, domains, _recovered_of)


def _recovered_of(means: Values) -> Values:
    """Recovered headroom `[resamples]` of base, expert and merged; NaN where an expert has no headroom."""
    base, expert, merged = np.moveaxis(means, 2, 0)
    headroom = expert - base
    share = (merged - base) / np.where(headroom > 0, headroom, 1.0)
    result: Values = np.where(headroom > 0, share, np.nan).mean(1)
    return result


def _verdict(rows: Mapping[str, SuiteResult], controls: Mapping[str, str]) -> str:
    """Say what the merge reached; a difference counts if its interval excludes zero.

    `controls` are titles by model key.
    """
    total = len(rows)
    above = [d for d, row in rows.items() if (row.over_expert.low or 0.0) > 0]
    short = [d for d, row in rows.items() if row.over_expert.high is not None and row.over_expert.high < 0]
    below = [d for d, row in rows.items() if row.over_base.high is not None and row.over_base.high < 0]
    parts = [f"reaches its expert within noise in {total - len(short)} of {total} domains"]
    if above:
        parts[0] += f" ({joined(above, 'and')}: above it)"
    statics = [row.over_static for row in rows.values() if row.over_static is not None]
    if statics:
        num_ahead = sum((s.low or 0.0) > 0 for s in statics)
        parts.append(f"ahead of the best static merge in {num_ahead} of {total}")
    parts += [
        _beside(title, [row.over_control[key] for row in rows.values()]) for key, title in controls.items()
    ]
    parts.append(f"below the base in {joined(below, 'and')}" if below else "below the base in none")
    return ", ".join(parts)


def _beside(title: str, differences: Sequence[Estimate]) -> str:
    """Say in how many domains the student is ahead of a control, and behind it."""
    num_ahead = sum((d.low or 0.0) > 0 for d in differences)
    num_behind = sum((d.high or 0.0) < 0 for d in differences)
    if not num_ahead and not num_behind:
        return f"level with {title}"
    parts = [f"ahead of {title} in {num_ahead} of {len(differences)}"] if num_ahead else []
    if num_behind:
        other = "it" if parts else title
        parts.append(f"behind {other} in {num_behind} of {len(differences)}")
    return " and ".join(parts)
