"""The figures of an update: one table for terminal and report page. Keys are those of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mergeopd.recipe.bridges import BRIDGES
from mergeopd.recipe.loss_terms import TERMS
from mergeopd.recipe.term_display import TermDisplay
from mergeopd.reporting.jsonl import UpdateRecord

MEASURES: Mapping[str, TermDisplay] = {
    **{key: row for key, row in TERMS.items() if key not in ("outcome", "nll")},
    **BRIDGES,
}
"""Measures of a teacher's tokens or groups."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One quantity. `column` is its short title for the terminal, "" if the terminal does not show it.

    A `unit` of % shows fractions times 100. A figure that always equals `hidden_when_constant` is not shown.
    On the page, the series of a `stacked` figure are stacked areas, and a `steady` one is not smoothed.
    `aim` is the good direction: low, high or zero; "" if there is none. `legend` is a shorter subtitle.
    The page has no chart of a figure without `is_charted`.
    """

    key: str
    column: str
    title: str
    subtitle: str = ""
    unit: str = ""
    hidden_when_constant: float | None = None
    stacked: bool = False
    steady: bool = False
    aim: Literal["low", "high", "zero", ""] = ""
    legend: str = ""
    is_charted: bool = True

    def is_informative(self, value: float | None) -> bool:
        """Whether a value is known and differs from `hidden_when_constant`."""
        return value is not None and value != self.hidden_when_constant


def _of_term(key: str, row: TermDisplay) -> Figure:
    return Figure(
        key, row.column, row.title, row.subtitle, row.unit, aim="high" if key == "reward" else "low"
    )


_NATS = "nats per token"
MEASURE_FIGURES = {key: _of_term(key, row) for key, row in MEASURES.items()}
TEACHER_FIGURES = (
    Figure(
        "logprob_gap",
        "gap",
        "Log-prob gap",
        "log p of teacher minus student at sampled tokens",
        _NATS,
        aim="zero",
        legend="teacher minus student log p",
        is_charted=False,  # in mixtures its two parts, charted below, cancel
    ),
    Figure(
        "logprob_gap_student",
        "",
        "Log-prob gap, student's responses",
        "log p of teacher minus student",
        _NATS,
        aim="zero",
    ),
    Figure(
        "logprob_gap_text",
        "",
        "Log-prob gap, others' text",
        "log p of teacher minus student",
        _NATS,
        aim="zero",
    ),
    Figure("entropy_T", "", "Teacher entropy", "of the next-token distribution", _NATS),
    Figure("entropy_gap", "", "Entropy gap", "mean |H of teacher - H of student|", _NATS, aim="low"),
    Figure(
        "overlap",
        "",
        "Overlap",
        "of the 16 likeliest tokens of student and teacher",
        "%",
        aim="high",
        legend="of the 16 likeliest tokens",
    ),
    Figure(
        "overlap_advantage",
        "",
        "Overlap advantage",
        "p (log p of teacher - student) over common likely tokens",
        "nats",
        aim="zero",
    ),
    Figure("shared_mass_S", "", "Student's shared mass", "student probability on common likely tokens", "%"),
    Figure("shared_mass_T", "", "Teacher's shared mass", "teacher probability on common likely tokens", "%"),
    Figure("num_groups", "", "Aligned groups", "of tokens with the same bytes in both tokenizations"),
    Figure("tokens_per_group", "", "Tokens per group", "of the student"),
    Figure("unaligned_fraction", "", "Unaligned", "student tokens in no group", "%", 0.0),
    Figure("matched_fraction", "", "Matched mass", "teacher probability on shared tokens", "%"),
)
DOMAIN_FIGURES = (
    _of_term("reward", TERMS["outcome"]),
    replace(_of_term("nll", TERMS["nll"]), legend="-log p of the student"),
    Figure(
        "entropy_S",
        "entropy",
        "Student entropy",
        "of the next-token distribution",
        _NATS,
        legend="of the student",
    ),
    Figure(
        "mean_length",
        "length",
        "Response length",
        "mean response tokens",
        "tokens",
        legend="tokens per response",
    ),
    Figure(
        "truncated_fraction",
        "cut",
        "Truncated",
        "responses that ended at the length limit",
        "%",
        0.0,
        aim="low",
        legend="at the length limit",
    ),
    Figure("repetition", "", "Repetition", "4-grams that occurred earlier in a response", "%", 0.0),
    Figure("mean_turns", "turns", "Turns", "of the assistant, per response with tools"),
    Figure("mean_calls", "", "Calls of tools", "per response"),
    Figure("failed_call_fraction", "", "Failed calls", "calls that could not be run", "%", 0.0, aim="low"),
    Figure(
        "token_share",
        "share",
        "Token share",
        "of the update's response tokens",
        "%",
        stacked=True,
        legend="of tokens",
    ),
    Figure("loss_share", "", "Loss share", "of the sum of absolute losses", "%", stacked=True),
    Figure(
        "weight",
        "weight",
        "Balance factor",
        "multiplies the domain's tokens in the loss",
        "",
        1.0,
        legend="factor in the loss",
    ),
)
POLICY_FIGURES = (
    Figure("rollout_logprob_gap", "", "Rollout log-prob gap", "|log pi_old - log behaviour|, mean", _NATS),
    Figure("rollout_logprob_gap_max", "", "Largest rollout log-prob gap", "of any token", "nats"),
    Figure("importance_weight", "", "Importance weight", "mean of the policy terms", "", 1.0),
    Figure("corrected_fraction", "corrected", "Corrected", "tokens with a bounded weight", "%", 0.0),
    Figure("clipped_fraction", "clipped", "Clipped", "tokens without gradient because of the clip", "%", 0.0),
    Figure("zero_advantage_fraction", "", "Zero advantage", "groups whose responses had one reward", "%"),
)
SERVING_FIGURES = (
    Figure("engine_gap", "", "Engine gap", "|log-prob of the servers - of the student|, mean", _NATS),
    Figure("engine_gap_max", "", "Largest engine gap", "of any token", "nats"),
    Figure("engine_kl", "", "Engine KL", "KL(servers || student) per sampled token", _NATS),
    Figure("lag", "", "Weight lag", "updates between generating and learning weights", "", 0.0),
    Figure("lag_max", "", "Largest weight lag", "of any response", "", 0.0),
    Figure("generation_s", "", "Generation", "seconds of a round, also behind training", "s"),
    Figure("wait_s", "", "Wait for responses", "seconds of the generation that were not hidden", "s"),
    Figure("sync_s", "", "Weight sync", "seconds to pass weights to the servers", "s"),
    Figure("num_retries", "", "Repeated requests", "to servers, so far", "", 0.0),
    Figure("num_stale", "", "Stale responses", "of other weights than the last, so far", "", 0.0),
    Figure("num_lost", "", "Lost servers", "so far", "", 0.0),
)
RUN_FIGURES = (
    Figure("loss", "loss", "Loss", "as minimised, with all weights"),
    Figure("grad_norm", "grad", "Gradient norm", "before clipping"),
    Figure("lr", "lr", "Learning rate", steady=True),
    Figure("on_policy_fraction", "on-policy", "On-policy", "responses of the student", "%", 1.0, steady=True),
    *POLICY_FIGURES,
    *SERVING_FIGURES,
    Figure("tokens_per_s", "", "Speed", "response tokens through a round", "tokens/s"),
)
NUM_TOKENS = Figure("num_tokens", "tokens", "Tokens", "response tokens in the loss")
SECONDS = Figure("seconds", "", "Seconds per update", "rollouts count to a round's first", "s", stacked=True)

STAGES: Mapping[str, tuple[int, str]] = {
    "rollout": (5, "cyan"),
    "teachers": (3, "magenta"),
    "update": (4, "green"),
    "text": (6, "yellow"),
    "interim": (2, "bright_blue"),
    "evaluation": (7, "blue"),
    "checkpoint": (8, "bright_black"),
    "export": (2, "bright_black"),
    "startup": (1, "bright_black"),
    "other": (9, "bright_black"),
}
"""Colours of stages: an index into the page's palette, apart from its first ones, and a terminal style."""


def run_value(record: UpdateRecord, key: str) -> float | None:
    """Return the value of one of `RUN_FIGURES`: of the update, its policy terms, its servers, or its cost."""
    for group in (record.policy, record.serving):
        if key in group:
            return group[key]
    value: float | None = getattr(record if hasattr(record, key) else record.cost, key, None)
    return value
