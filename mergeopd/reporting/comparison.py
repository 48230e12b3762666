"""Build a result from the rewards of an evaluation: intervals, comparisons and a verdict in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mergeopd.intervals import Values, difference_interval, paired_interval, wilson
from mergeopd.messages import joined
from mergeopd.reporting.result import Estimate, Kind, Model, Result, SuiteResult

Scores = Mapping[str, Mapping[str, Values]]


@dataclass(frozen=True, slots=True)
class Measured:
    """What an evaluation measured.

    `scores` has the mean reward of each prompt, by model key and suite, `passes` each prompt's pass@k by k.
    `experts` maps each suite to the key of its expert, None without one, `overlap` to the number of its
    prompts that are also trained on, `domains` to its domain (default: its name), `samples` to its responses
    per prompt (default: one). Models may lack suites. `trained_tokens` are those of `Result`.
    """

    models: tuple[Model, ...]
    scores: Scores
    experts: Mapping[str, str | None]
    overlap: Mapping[str, int]
    domains: Mapping[str, str] = field(default_factory=dict)
    samples: Mapping[str, int] = field(default_factory=dict)
    passes: Mapping[str, Mapping[str, Mapping[int, Values]]] = field(default_factory=dict)
    trained_tokens: Mapping[str, int] = field(default_factory=dict)


def build_result(measured: Measured, seconds: Mapping[str, float], update: int | None = None) -> Result:
    """Build the result of a run that took `seconds` by stage; `update` is the one it exported as the best."""
    models, scores, experts = measured.models, measured.scores, measured.experts
    # Means and the best models are over the suites that have an expert, so that their columns compare.
    compared = [suite for suite, expert in experts.items() if expert is not None] or list(experts)
    best = {
        kind: max(
            (m.key for m in models if m.kind == kind and scores[m.key].keys() >= set(compared)),
            key=lambda key: sum(float(scores[key][suite].mean()) for suite in compared),
            default=None,
        )
        for kind in ("static_merge", "expert", "control")
    }
    static, control = best["static_merge"], best["control"]
    controls = {m.key: m.title for m in models if m.kind == "control"}
    rows = {suite: _suite(suite, static, tuple(controls), measured) for suite in experts}
    with_headroom = [suite for suite in compared if rows[suite].recovered.value is not None]
    keys: dict[Kind, Callable[[str], str | None]] = {
        "base": lambda suite: "base",
        "expert": lambda suite: experts[suite],
        "static_merge": lambda suite: static,
        "control": lambda suite: control,
        "merged": lambda suite: "merged",
    }
    values = {kind: [_values(scores, key(suite), suite) for suite in compared] for kind, key in keys.items()}
    return Result(
        models=tuple(models),
        suites=rows,
        mean={
            kind: _mean(of)
            for kind, row in values.items()
            if len(of := [v for v in row if v is not None]) == len(row)
        },
        mean_recovered=recovered_share(
            [_triple(scores, suite, str(experts[suite])) for suite in with_headroom]
        ),
        best_static=static,
        best_expert=best["expert"],
        best_control=control,
        verdict=_verdict(rows, controls),
        seconds=dict(seconds),
        update=update,
        trained_tokens=dict(measured.trained_tokens),
    )


def _values(scores: Scores, key: str | None, suite: str) -> Values | None:
    return None if key is None else scores.get(key, {}).get(suite)


def _suite(suite: str, static: str | None, controls: Sequence[str], measured: Measured) -> SuiteResult:
    scores, expert = measured.scores, measured.experts[suite]
    own = {key: by_suite[suite] for key, by_suite in scores.items() if suite in by_suite}
    is_whole = expert is not None and own.keys() >= {"base", expert, "merged"}
    return SuiteResult(
        expert=expert,
        num_prompts=max(map(len, own.values()), default=0),
        accuracy={key: mean_reward(values) for key, values in own.items()},
        recovered=recovered_share([_triple(scores, suite, str(expert))] if is_whole else []),
        over_base=difference(own.get("merged"), own.get("base")),
        over_expert=difference(own.get("merged"), own.get(expert or "")),
        over_static=None if static is None else difference(own.get("merged"), own.get(static)),
        over_control={key: difference(own.get("merged"), own[key]) for key in controls if key in own},
        overlap=measured.overlap.get(suite, 0),
        domain=measured.domains.get(suite, suite),
        samples=measured.samples.get(suite, 1),
        pass_at_k={
            key: {k: mean_reward(values) for k, values in by_suite[suite].items()}
            for key, by_suite in measured.passes.items()
            if by_suite.get(suite)
        },
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


def difference(merged: Values | None, other: Values | None) -> Estimate:
    """Return the difference of two accuracies on the same prompts."""
    if merged is None or other is None:
        return Estimate(None)
    interval = difference_interval(merged, other)
    return Estimate(float(merged.mean() - other.mean()), interval.low, interval.high)


def recovered_share(domains: Sequence[Sequence[Values]]) -> Estimate:
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
    compared = {name: row for name, row in rows.items() if row.over_expert.value is not None}
    total = len(compared)
    noun = "domains" if all(row.domain == name for name, row in rows.items()) else "suites"
    parts = []
    if compared:
        above = [name for name, row in compared.items() if _sign(row.over_expert) > 0]
        num_short = sum(_sign(row.over_expert) < 0 for row in compared.values())
        parts.append(f"reaches its expert within noise in {total - num_short} of {total} {noun}")
        if above:
            parts[0] += f" ({joined(above, 'and')}: above it)"
        statics = [row.over_static for row in compared.values() if row.over_static is not None]
        if statics:
            num_ahead = sum(_sign(estimate) > 0 for estimate in statics)
            parts.append(f"ahead of the best static merge in {num_ahead} of {total}")
    trained = {name: row for name, row in rows.items() if row.expert and row.over_base.value is not None}
    for key, title in controls.items():
        differences = [row.over_control[key] for row in trained.values() if key in row.over_control]
        parts += [_beside(title, differences)] if differences else []
    below = [name for name, row in trained.items() if _sign(row.over_base) < 0]
    if trained:
        parts.append(f"below the base in {joined(below, 'and')}" if below else "below the base in none")
    parts += _retained(rows)
    if not parts:
        measured = any("merged" in row.accuracy for row in rows.values())
        return "was measured without the models to compare it with" if measured else "was not measured"
    return ", ".join(parts)


def _beside(title: str, differences: Sequence[Estimate]) -> str:
    """Say in how many suites the student is ahead of a control, and behind it."""
    num_ahead = sum(_sign(difference) > 0 for difference in differences)
    num_behind = sum(_sign(difference) < 0 for difference in differences)
    if not num_ahead and not num_behind:
        return f"level with {title}"
    parts = [f"ahead of {title} in {num_ahead} of {len(differences)}"] if num_ahead else []
    if num_behind:
        other = "it" if parts else title
        parts.append(f"behind {other} in {num_behind} of {len(differences)}")
    return " and ".join(parts)


def _retained(rows: Mapping[str, SuiteResult]) -> list[str]:
    """Say what the student kept of the skills that no prompt trains."""
    changes = {
        n: row.over_base for n, row in rows.items() if row.expert is None and row.over_base.value is not None
    }
    signed = {name: f"{100 * (change.value or 0.0):+.1f} points" for name, change in changes.items()}
    kept = [f"{name} ({signed[name]})" for name, change in changes.items() if not _sign(change)]
    lost = [f"{name}: {signed[name]}" for name, change in changes.items() if _sign(change) < 0]
    gained = [f"{name}: {signed[name]}" for name, change in changes.items() if _sign(change) > 0]
    parts = [f"keeps {joined(kept, 'and')} within noise"] if kept else []
    parts += [f"gains {joined(gained, 'and')}"] if gained else []
    return parts + ([f"forgets {joined(lost, 'and')}"] if lost else [])


def _sign(estimate: Estimate) -> int:
    """Return the sign of a difference, 0 if its interval contains zero or it is not known."""
    return ((estimate.low or 0.0) > 0) - ((estimate.high or 0.0) < 0)
