"""The numbers that trackers get, under names such as `teacher_reverse_kl/math`.

Keys are those of metrics.jsonl; trackers group charts by the part before the slash. Missing values are left
out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from mergeopd import __version__
from mergeopd.messages import shown
from mergeopd.recipe.plan import Plan
from mergeopd.reporting.events import AccuracyMeasured, AlarmRaised
from mergeopd.reporting.jsonl import Cost, UpdateRecord
from mergeopd.reporting.result import Estimate, Result

_HUB_MODEL = re.compile(r"models--([^/]+)--([^/]+)")


def update_values(record: UpdateRecord) -> dict[str, float]:
    """Return the numbers of an update."""
    values: dict[str, float | None] = {
        f"update/{key}": value for key, value in _numbers(record) if key != "update"
    }
    for kind, parts in (("teacher", record.teachers), ("domain", record.domains)):
        values |= {f"{kind}_{key}/{name}": value for name, own in parts.items() for key, value in own.items()}
    values |= {f"policy/{key}": value for key, value in record.policy.items()}
    values |= {f"verifier_failures/{source}": value for source, value in record.verifier_failures.items()}
    values |= {
        f"text_kept/{teacher}/{domain}": share
        for teacher, own in record.text_kept.items()
        for domain, share in own.items()
    }
    values |= {f"selected/{source}": share for source, share in record.selected.items()}
    values |= {f"seconds/{stage}": value for stage, value in record.cost.seconds.items()}
    values |= {f"cost/{key}": value for key, value in _numbers(record.cost)}
    return _known(values)


def accuracy_values(event: AccuracyMeasured) -> dict[str, float]:
    """Return the accuracies of a measurement during the run."""
    return _known({f"accuracy/{suite}": estimate.value for suite, estimate in event.accuracy.items()})


def result_values(result: Result) -> dict[str, float]:
    """Return the figures of a result; intervals are `_low` and `_high`."""
    figures: dict[str, Estimate | None] = {"result_mean/recovered": result.mean_recovered}
    figures |= {f"result_mean/{kind}": estimate for kind, estimate in result.mean.items()}
    for name, row in result.suites.items():
        figures |= {f"result/{name}/{kind}": estimate for kind, estimate in result.headline(name).items()}
        for key in ("recovered", "over_base", "over_expert", "over_static"):
            figures[f"result/{name}/{key}"] = getattr(row, key)
    values: dict[str, float | None] = {}
    for name, estimate in figures.items():
        if estimate is not None:
            values |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return _known(values)


def config_values(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON values, without the user's folders above the current one."""
    content: dict[str, Any] = _without_folders(plan.content)
    return {"mergeopd": __version__, "plan_hash": plan.hash, **content}


def alarm_texts(alarm: AlarmRaised) -> tuple[str, str]:
    """Return a title such as `starved math`, and what was seen, why, and what to change."""
    return f"{alarm.name} {alarm.subject}".strip(), f"{alarm.finding}; {alarm.cause}; {alarm.remedy}"


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of nested JSON values by dotted keys, such as `phases.0.loss`."""
    return dict(_leaves(config, ""))


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    parts = value if isinstance(value, Mapping) else dict(enumerate(value)) if isinstance(value, list) else {}
    if not parts:
        yield key, value
    for name, part in parts.items():
        yield from _leaves(part, f"{key}.{name}" if key else str(name))


def _numbers(record: UpdateRecord | Cost) -> Iterator[tuple[str, float]]:
    own = ((field.name, getattr(record, field.name)) for field in fields(record))
    return ((key, value) for key, value in own if isinstance(value, int | float))


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_folders(part) for part in value]
    if not isinstance(value, str) or not os.path.isabs(value) or not os.path.exists(value):
        return value
    if (path := shown(Path(value))) != value:
        return path
    hub = _HUB_MODEL.search(value)
    return f"{hub[1]}/{hub[2]}" if hub else Path(value).name
