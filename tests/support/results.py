"""Results of runs with given accuracies."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mergeopd.reporting.comparison import Measured, build_result
from mergeopd.reporting.result import Model, Result

KINDS = {"base": "base", "expert": "expert", "merge": "static_merge", "merged": "merged"}


def result_of(
    accuracies: Mapping[str, Mapping[str, float]], seconds: Mapping[str, float] = {}, num: int = 1000
) -> Result:
    """`accuracies` by domain and model key; a domain's expert is the first key that begins with `expert/`."""
    keys = dict.fromkeys(key for row in accuracies.values() for key in row)
    models = [Model(key, KINDS[key.split("/")[0]], key.split("/")[-1]) for key in keys]  # type: ignore[arg-type]
    scores = {
        key: {
            d: (np.arange(num) < round(row[key] * num)).astype(float)
            for d, row in accuracies.items()
            if key in row
        }
        for key in keys
    }
    experts = {d: next(key for key in row if key.startswith("expert/")) for d, row in accuracies.items()}
    return build_result(Measured(tuple(models), scores, experts, {}), seconds)
