"""Runs on gloo grids that end before their end: what every rank says, and that the same command goes on."""

from __future__ import annotations

import re
import sys

import pytest

from grid_jobs import LONG_BROKEN, SHORT_BROKEN, complaint
from grid_runs import assert_same_figures, metrics, samples
from ranks import needs_megatron

pytestmark = [
    needs_megatron,
    pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's"),
]

ELSEWHERE = "PeerFailed: another process of the run ended"


# By recipe: how the complaint begins.
BEGINNINGS = {
    "NaN in a body": "TeacherError: teacher 'one' produced NaN",
    "NaN in a head": "NumericsError: the logits of target",
    "uniform": "TeacherError: teacher 'two' gives all 11 tokens the same",
    "canary": "TeacherError: teacher 'three' is not the model its card describes",
    "canary of a writer": "TeacherError: teacher 'three' is not the model its card describes",
}
# How many processes meet it: one verifies the cards; others all or some.
MET_BY = {"canary": 1, "canary of a writer": 1}


@pytest.mark.parametrize(
    ("recipe", "grid"),
    [*SHORT_BROKEN, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG_BROKEN)],
)
def test_an_error_is_that_of_one_process_and_no_rank_is_left_behind(grid_folder, told, recipe, grid):
    said = told("short" if (recipe, grid) in SHORT_BROKEN else "four")[f"{recipe}, {grid}"]
    expected = complaint(grid_folder / f"{recipe}.recipe.yaml")
    assert expected.startswith(BEGINNINGS[recipe])
    if recipe == "NaN in a head":  # of which the kernel tells the tokens of the micro-batch
        assert len(set(said)) == 1
        pattern = r"NumericsError: the logits of target \d: not finite at .*\(targets: .*two\)"
        assert re.fullmatch(pattern, said[0])
        return
    assert set(said) <= {expected, ELSEWHERE}
    assert said.count(expected) == MET_BY.get(recipe, said.count(expected)) > 0
    assert not (grid_folder / "runs" / f"{recipe}, {grid}" / "checkpoints").exists()


ALL_SAVED = "all saved; run the same command to resume"
MEASURED = "during evaluation; training and export are saved; run the same command to evaluate again"


@pytest.mark.parametrize(
    ("stage", "launch", "rest"),
    [
        ("rollout", "short", f"after 4 of 6 updates, {ALL_SAVED}"),
        pytest.param("text", "four", f"after 0 of 6 updates, {ALL_SAVED}", marks=pytest.mark.long),
        pytest.param("evaluation", "four", MEASURED, marks=pytest.mark.long),
    ],
)
def test_a_request_to_one_rank_stops_all_in_the_middle_of_a_stage_and_they_go_on(
    grid_folder, alone, told, stage, launch, rest
):
    name = f"stopped in {stage}"
    assert told(launch)[name] == [f"Stopped: stopped by SIGTERM {rest}"] * 4
    assert told(launch)[f"{name}, again"] == [None] * 4
    assert_same_figures(grid_folder / "runs" / name, alone("cold start"))


def test_a_run_that_was_stopped_is_to_the_bit_the_one_that_was_not(grid_folder, told):
    assert told("short")["stopped in rollout, again"] == told("short")["cold start, TP2xPP2"] == [None] * 4
    runs = [grid_folder / "runs" / name for name in ("stopped in rollout", "cold start, TP2xPP2")]
    for read in (metrics, samples):
        assert read(runs[0]) == read(runs[1])
    weights = [(run / "export" / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
