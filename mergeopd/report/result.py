"""The result of a merge: accuracies, and the share of each expert's headroom that was recovered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mergeopd.storage.folders import write_atomic
from mergeopd.storage.metrics import json_text

MODELS = ("base", "expert", "weight_average", "merged")


def recovered_headroom(base: float, expert: float, merged: float) -> float | None:
    """(merged - base) / (expert - base); None where the expert is not better than the base."""
    return (merged - base) / (expert - base) if expert > base else None


def result_document(
    domains: Mapping[str, Mapping[str, float | None]], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """`result.json`: accuracies (0 to 1) per domain, recovered headroom and its mean, where the time went.

    Each domain gives `base`, `expert`, `merged` and `weight_average`; the last is None or left out where the
    experts cannot be averaged (different shapes). `mean_recovered` is over the domains that have headroom.

    Raises:
        ValueError: a domain has other keys, or lacks a value.
    """
    rows: dict[str, dict[str, float | None]] = {}
    for name, given in domains.items():
        if not set(given) <= set(MODELS):
            raise ValueError(f"domain {name!r} has {sorted(given)}, not only {sorted(MODELS)}")
        base, expert, merged = (given.get(model) for model in ("base", "expert", "merged"))
        if base is None or expert is None or merged is None:
            raise ValueError(f"domain {name!r} lacks the accuracy of base, expert or merged")
        rows[name] = {
            **{model: given.get(model) for model in MODELS},
            "recovered": recovered_headroom(base, expert, merged),
        }
    return {
        "domains": rows,
        "mean_recovered": complete_mean(
            row["recovered"] for row in rows.values() if row["recovered"] is not None
        ),
        "seconds": dict(seconds),
    }


def write_result(path: Path, document: Mapping[str, Any]) -> None:
    """Write `result.json`, whole or not at all.

    Raises:
        StorageError: the disk refuses.
    """
    write_atomic(path, json_text(document, indent=2) + "\n")


def complete_mean(values: Iterable[float | None]) -> float | None:
    """Mean, or None when there is no value or one is missing."""
    numbers = list(values)
    known = [number for number in numbers if number is not None]
    return sum(known) / len(known) if known and len(known) == len(numbers) else None
