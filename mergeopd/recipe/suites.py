"""Suites of an evaluation: sources that are one row of the result, with the same settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergeopd.config.locate import Origins, dotted
from mergeopd.config.suggest import did_you_mean
from mergeopd.config.tree import Keys
from mergeopd.errors import Problem
from mergeopd.messages import joined
from mergeopd.recipe.plan import SourcePlan, SuitePlan
from mergeopd.recipe.schema import EvalSource, Evaluation, equal_responses
from mergeopd.recipe.valid_parts import ValidParts

MEAN_ACCURACY = "accuracy"
"""The mean over suites, as the value of `checkpoint.best`."""
_SETTINGS = ("max_new_tokens", "samples", "temperature", "top_p")


def suite_name(source: EvalSource) -> str:
    return source.name or source.domain


def _setting(source: EvalSource, evaluation: Evaluation, key: str) -> int | float | None:
    own: int | float | None = getattr(source, key)
    return getattr(evaluation, key) if own is None else own


def suite_problems(parts: ValidParts, origins: Origins) -> Iterator[Problem]:
    """Check that the sources of a suite agree, and that several responses to a prompt can differ."""
    first_of: dict[str, tuple[int, EvalSource]] = {}
    for index, source in parts.eval_sources.items():
        here: Keys = ("evaluation", "prompts", index)
        name = suite_name(source)
        at, first = first_of.setdefault(name, (index, source))
        there = dotted(("evaluation", "prompts", at))
        remedy = "give each suite a `name` of its own"
        if first.domain != source.domain:
            message = f"suite '{name}' is of domain '{first.domain}' at {there}"
            yield origins.problem(here, message, remedy)
        if (evaluation := parts.evaluation) is None:
            continue
        for key in _SETTINGS:
            one, other = (_setting(each, evaluation, key) for each in (source, first))
            if one != other:
                message = (
                    f"suite '{name}' has `{key}: {_written(other)}` at {there}, and {_written(one)} here"
                )
                yield origins.problem((*here, key), message, f"use one value, or {remedy}")
        samples, temperature = (_setting(source, evaluation, key) for key in ("samples", "temperature"))
        if samples is not None and samples > 1 and not temperature:
            yield origins.problem(here, equal_responses(int(samples)))


def best_problems(parts: ValidParts, origins: Origins) -> Iterator[Problem]:
    """Check that the accuracy by which the best student is chosen is measured during training."""
    best = None if parts.checkpoint is None else parts.checkpoint.best
    if best is None:
        return
    here: Keys = ("checkpoint", "best")
    if parts.evaluation is not None and parts.evaluation.interim is None:
        remedy = "set `evaluation.interim: {every: N}`, or remove the key"
        yield origins.problem(here, "no accuracy is measured during training", remedy)
    elif parts.evaluation is None and not parts.eval_sources:
        yield origins.problem(here, "the recipe evaluates nothing", "add `evaluation`, or remove the key")
    names = dict.fromkeys(suite_name(source) for source in parts.eval_sources.values())
    if names and best not in (MEAN_ACCURACY, *names):
        known = (MEAN_ACCURACY, *names)
        remedy = did_you_mean(best, known, f"use {joined([f'`{name}`' for name in known], 'or')}")
        yield origins.problem(here, f"no suite '{best}'", remedy)


def _known_settings(source: EvalSource, evaluation: Evaluation) -> dict[str, Any]:
    values = {key: _setting(source, evaluation, key) for key in _SETTINGS}
    return {key: value for key, value in values.items() if value is not None}


def _written(value: float | None) -> str:
    return "the default" if value is None else f"{value:g}"


def suites(
    evaluation: Evaluation,
    max_new_tokens: int,
    sources: Sequence[SourcePlan],
    experts: Mapping[str, str | None],
) -> tuple[SuitePlan, ...]:
    """Group the sources, in the order of the recipe; `max_new_tokens` is the default of the rollouts."""
    grouped: dict[str, list[tuple[EvalSource, SourcePlan]]] = {}
    for written, source in zip(evaluation.prompts, sources, strict=True):
        grouped.setdefault(suite_name(written), []).append((written, source))
    return tuple(
        SuitePlan(
            name=name,
            domain=members[0][0].domain,
            expert=experts[members[0][0].domain],
            sources=tuple(source for _, source in members),
            **{"max_new_tokens": max_new_tokens, **_known_settings(members[0][0], evaluation)},
        )
        for name, members in grouped.items()
    )
