"""Merges that bear out verdicts: with and without a cold start, and with several teachers of one domain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from planted_pairs.pairs import Maker, Pair

PROMPTS = 32  # per update
EVALUATED = 128


def cold_start_pairs(make: Maker, domains: Sequence[str]) -> Mapping[str, Pair]:
    """Return two pairs of each domain: the student is the experts' base, or the expert of another domain."""
    known = list(make.experts.settings.expert)
    pairs = {}
    for domain in domains:
        other = known[(known.index(domain) + 1) % len(known)]
        students = {"base": make.of("base"), f"expert for {other}": make.of(other)}
        for name, student in students.items():
            pairs[f"{name}, {domain}"] = make.pair(
                domain, "ready or cold_start", student=student, teacher=make.of(domain)
            )
    return pairs


def teachers_of(make: Maker, domain: str) -> Mapping[str, Pair]:
    """Return three teachers of a domain: the expert, an early checkpoint of it, a smaller generalist."""
    early = make.between(f"early_{domain}", domain, 0.1)
    return {
        f"base, {domain}": make.pair(domain, "ready", teacher=make.of(domain)),
        f"base, early {domain}": make.pair(domain, "ready", teacher=early),
        f"base, smaller base, {domain}": make.pair(domain, "ready", teacher=make.of("small_base")),
    }


def phases(updates: int, *, cold_start: bool) -> list[dict[str, Any]]:
    """Return an on-policy merge; of one with a cold start, a quarter of the updates are on teacher text."""
    common = {"prompts_per_round": PROMPTS}
    if not cold_start:
        return [{**common, "name": "merge", "loss": "reverse_kl", "updates": updates}]
    num = max(1, updates // 4)
    return [
        {**common, "name": "cold", "text": "teacher", "loss": "forward_kl", "updates": num},
        {**common, "name": "merge", "loss": "reverse_kl", "updates": updates - num},
    ]


def accuracies(
    pair: Pair, folder: Path, own_phases: Sequence[Mapping[str, Any]], seed: int
) -> dict[str, float]:
    """Run a merge of a pair; return the accuracies of the student before and after, and the teacher's."""
    import mergeopd

    recipe = pair.write(folder)
    suite = {
        "source": str(pair.experts.folder / "data" / f"eval_{pair.domain}.jsonl"),
        "domain": pair.domain,
        "verifier": pair.verifier,
        "limit": EVALUATED,
    }
    settings = {
        "phases": list(own_phases),
        "seed": seed,
        "optimizer.warmup_updates": min(4, own_phases[0]["updates"]),
        "evaluation": {"prompts": [suite], "static_merges": []},
        "checkpoint.every": 1_000_000,
        "text_cache": str(folder / "texts"),
        "output": str(folder / "run"),
    }
    done = mergeopd.run(recipe, set=settings)
    (found,) = done.accuracies.values()
    return {name: value for name, value in found.items() if value is not None}


def ranks(values: Sequence[float]) -> list[float]:
    """Return the ranks of values from 1; equal values have the mean of their ranks."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the rank correlation of two sequences; NaN if the values of one are all equal."""
    mean = (len(one) + 1) / 2
    a, b = ([rank - mean for rank in ranks(values)] for values in (one, other))
    norm = math.hypot(*a) * math.hypot(*b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / norm if norm else math.nan
