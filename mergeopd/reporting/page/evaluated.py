"""Evaluated responses for the page: the prompts on which the merged student fails, regressions first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mergeopd.reporting.page.run_data import RunData
from mergeopd.storage.responses import EvaluatedResponse

MAX_PROMPTS = 20
MAX_CHARACTERS = 2000
Rows = Mapping[str, Sequence[EvaluatedResponse]]


@dataclass(frozen=True, slots=True)
class ShownResponse:
    """One model's response to a prompt: its worst sample; `reward` is the mean over all of them."""

    title: str
    response: str
    reward: float
    failure: str | None
    finish: str
    num_samples: int


@dataclass(frozen=True, slots=True)
class FailedPrompt:
    """A prompt on which the merged student got less than the full reward; its response is the first."""

    prompt: str
    reference: str | None
    responses: tuple[ShownResponse, ...]

    @property
    def lost(self) -> float:
        """Reward that the best of the other models has more than the merged student."""
        merged, *others = (response.reward for response in self.responses)
        return max(others, default=0.0) - merged


@dataclass(frozen=True, slots=True)
class SuiteFailures:
    """The failures of a suite, those with the largest regression first; at most `MAX_PROMPTS` of them."""

    num_prompts: int
    num_failed: int
    num_regressions: int
    prompts: tuple[FailedPrompt, ...]


def build_failures(data: RunData) -> dict[str, SuiteFailures]:
    """Collect failures by suite from the responses of the merged student, the base and the suite's expert."""
    if data.result is None or "merged" not in data.responses:
        return {}
    titles = {model.key: model.title for model in data.result.models}
    failures = {}
    for suite, row in data.result.suites.items():
        keys = ["merged", "base"] + ([row.expert] if row.expert else [])
        by_model = {titles[key]: by_prompt(data.responses.get(key, ()), suite) for key in keys}
        merged = by_model[titles["merged"]]
        if not merged:
            continue
        failed = [_failed(key, by_model) for key, rows in merged.items() if mean_reward(rows) < 1.0]
        regressions = sum(prompt.lost > 0 for prompt in failed)
        worst = sorted(failed, key=lambda prompt: -prompt.lost)[:MAX_PROMPTS]
        failures[suite] = SuiteFailures(len(merged), len(failed), regressions, tuple(worst))
    return failures


def by_prompt(rows: Iterable[EvaluatedResponse], suite: str) -> dict[str, list[EvaluatedResponse]]:
    """Group a model's responses of one suite by prompt."""
    groups: defaultdict[str, list[EvaluatedResponse]] = defaultdict(list)
    for row in rows:
        if (row.suite or row.domain) == suite:
            groups[row.key].append(row)
    return dict(groups)


def mean_reward(rows: Sequence[EvaluatedResponse]) -> float:
    """Return the mean reward of the responses to one prompt; those that could not be verified count as 0."""
    return sum(row.reward or 0.0 for row in rows) / len(rows)


def _failed(key: str, by_model: Mapping[str, Mapping[str, Sequence[EvaluatedResponse]]]) -> FailedPrompt:
    own = {title: rows[key] for title, rows in by_model.items() if key in rows}
    first = next(iter(own.values()))[0]
    return FailedPrompt(
        _shortened(first.prompt),
        None if first.reference is None else _shortened(first.reference),
        tuple(_shown(title, rows) for title, rows in own.items()),
    )


def _shown(title: str, rows: Sequence[EvaluatedResponse]) -> ShownResponse:
    worst = min(rows, key=lambda row: row.reward or 0.0)
    return ShownResponse(
        title, _shortened(worst.response), mean_reward(rows), worst.failure, worst.finish, len(rows)
    )


def _shortened(text: str) -> str:
    more = len(text) - MAX_CHARACTERS
    return text if more <= 0 else f"{text[:MAX_CHARACTERS]} … {more:,} more characters"
