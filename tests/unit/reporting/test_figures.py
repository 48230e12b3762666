"""One table of loss terms and one of figures: nothing that is measured lacks a title."""

from __future__ import annotations

import io
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from rich.console import Console

from mergeopd.batch.objective import phase_objective
from mergeopd.recipe.bridges import BRIDGES, KINDS
from mergeopd.recipe.loss_terms import DIVERGENCE_TERMS, TERMS, Loss
from mergeopd.recipe.policy_terms import POLICY_TERMS
from mergeopd.recipe.training import Phase
from mergeopd.reporting.events import (
    BridgeFigures,
    DomainStats,
    PolicyStats,
    RunStarted,
    ServingStats,
    TeacherStats,
    UpdateDone,
)
from mergeopd.reporting.figures import (
    DOMAIN_FIGURES,
    MEASURE_FIGURES,
    MEASURES,
    NUM_TOKENS,
    POLICY_FIGURES,
    RUN_FIGURES,
    SERVING_FIGURES,
    TEACHER_FIGURES,
    run_value,
)
from mergeopd.reporting.jsonl import UpdateRecord, update_record
from mergeopd.reporting.page.curves import build_curves
from mergeopd.reporting.terminal.plain import PlainReporter
from mergeopd.reporting.trackers.values import update_values

OBJECTIVES = Path(__file__).parents[3] / "docs" / "objectives.md"
UPDATE = UpdateDone(
    update=1, phase="merge", round=0, lr=0.1, loss=0.2, grad_norm=0.3, num_tokens=4, on_policy_fraction=0.5,
    teachers={}, domains={}, seconds={"update": 2.0}, policy=PolicyStats(0.6, 0.7, 0.8, 0.9, 1.1, 1.2),
    serving=ServingStats(1.3, 1.35, 1.4, 1.5, 2, 3, 4, 5, 1.6, 1.7, 1.8),
)  # fmt: skip


def test_the_terms_of_recipe_kernel_and_display_agree() -> None:
    settings = {"temperature", "support"}
    assert TERMS.keys() == Loss.model_fields.keys() - settings == {*DIVERGENCE_TERMS, *POLICY_TERMS, "nll"}
    assert tuple(BRIDGES) == KINDS
    whole = Phase(name="all", updates=1, loss=Loss.model_validate(dict.fromkeys(DIVERGENCE_TERMS, 1.0)))
    # The first divergence of an objective is the one shown.
    names = tuple(phase_objective(whole, 0, has_policy=False).names)
    assert names == DIVERGENCE_TERMS == tuple(key for key in MEASURES if key in names)


@pytest.mark.parametrize("key", MEASURES)
def test_a_measure_has_one_name_in_metrics_terminal_page_and_trackers(key: str) -> None:
    title, column = MEASURES[key].title, MEASURES[key].column
    event = replace(UPDATE, teachers={"math": TeacherStats(4, {key: 0.25}, 0.0625)})
    assert update_record(event)["teachers"]["math"][key] == 0.25
    assert update_values(UpdateRecord.of(event))[f"teacher_{key}/math"] == 0.25
    charts = {chart.figure.title: chart for chart in build_curves([UpdateRecord.of(event)]).charts}
    assert charts[title].series[0].values == (0.25,)
    console = Console(file=io.StringIO(), width=300)
    reporter = PlainReporter(console, lambda: 0.0)
    reporter.emit(RunStarted("x", "x.yaml", 9, (("merge", 9),), ("math",), ("math",), Path("run"), 0))
    reporter.emit(event)
    assert f"{column}: math 0.2500" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("key", [*TERMS, *BRIDGES])
def test_every_term_has_titles_and_is_documented(key: str) -> None:
    row = {**TERMS, **BRIDGES}[key]
    assert row.title
    assert row.subtitle
    assert len(row.column) <= 12  # a column of the terminal
    assert row.colour_scale > 0
    assert re.search(rf"\b{key}\b", OBJECTIVES.read_text(encoding="utf-8")), f"docs/objectives.md lacks {key}"


def test_titles_and_columns_are_distinct() -> None:
    rows = [*TERMS.values(), *BRIDGES.values()]
    assert len({row.title for row in rows}) == len({row.column for row in rows}) == len(rows)


def test_every_statistic_of_an_update_has_a_figure() -> None:
    def names(kind: type) -> set[str]:
        return {field.name for field in fields(kind)}

    counts = {"num_tokens", "num_rollouts"}
    of_teachers = (names(TeacherStats) - {"divergence", "bridge"}) | names(BridgeFigures)
    assert of_teachers == {figure.key for figure in (*TEACHER_FIGURES, NUM_TOKENS)}
    assert names(DomainStats) - counts == {figure.key for figure in DOMAIN_FIGURES}
    assert names(PolicyStats) == {figure.key for figure in POLICY_FIGURES}
    assert names(ServingStats) == {figure.key for figure in SERVING_FIGURES}
    assert MEASURE_FIGURES.keys() == MEASURES.keys()


def test_values_of_the_run_come_from_update_policy_and_cost() -> None:
    record = UpdateRecord.of(UPDATE)
    assert {figure.key: run_value(record, figure.key) for figure in RUN_FIGURES} == {
        "loss": 0.2, "grad_norm": 0.3, "lr": 0.1, "on_policy_fraction": 0.5, "tokens_per_s": 2.0,
        "corrected_fraction": 0.6, "clipped_fraction": 0.7, "importance_weight": 0.8,
        "rollout_logprob_gap": 0.9, "rollout_logprob_gap_max": 1.1, "zero_advantage_fraction": 1.2,
        "generation_s": 1.3, "wait_s": 1.35, "sync_s": 1.4, "lag": 1.5, "lag_max": 2, "num_retries": 3, "num_stale": 4, "num_lost": 5,
        "engine_gap": 1.6, "engine_gap_max": 1.7, "engine_kl": 1.8,
    }  # fmt: skip
