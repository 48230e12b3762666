"""Runs on gloo grids that end before their end: what every rank says, and that the same command goes on."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("megatron.core", reason="the extra mergeopd[megatron] is not installed")

from grid_jobs import BROKEN, complaint
from grid_runs import gap, lines, metrics, samples

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's")

ELSEWHERE = "EndedElsewhere: another process of the run ended"
SHORT = (("NaN in a body", "TP2xDP2"), ("verifier", "TP2xDP2"))
LONG = [(name, grid) for name in BROKEN for grid in ("TP2xPP2", "DP4")]


@pytest.mark.parametrize(
    ("recipe", "grid"), [*SHORT, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)]
)
def test_an_error_is_that_of_one_process_and_no_rank_is_left_behind(grid_folder, told, recipe, grid):
    said = told("short" if (recipe, grid) in SHORT else "four")[f"{recipe}, {grid}"]
    expected = complaint(grid_folder / f"{recipe}.recipe.yaml")
    assert set(said) <= {expected, ELSEWHERE}
    assert expected in said
    if recipe in ("canary", "canary of a writer", "verifier"):  # which one process alone can meet
        assert said.count(expected) == 1
    assert not (grid_folder / "runs" / f"{recipe}, {grid}" / "checkpoints").exists()


def test_a_request_to_one_rank_stops_all_in_the_middle_and_they_go_on(grid_folder, alone, told):
    stopped = "Stopped: stopped by SIGTERM after 4 of 6 updates, all saved; the same command goes on"
    assert told("short")["stopped"] == [stopped] * 4
    assert told("short")["again"] == [None] * 4
    run = grid_folder / "runs" / "stopped"
    assert len(lines(run / "metrics.jsonl")) == 6
    for read in (metrics, samples):
        assert gap(read(run), read(alone("cold start")), floor=0.3)[0] <= 1e-5


@pytest.mark.long
def test_a_run_that_was_stopped_is_to_the_bit_the_one_that_was_not(grid_folder, told):
    assert told("short")["again"] == told("four")["cold start, TP2xPP2"] == [None] * 4
    stopped, straight = (grid_folder / "runs" / name for name in ("stopped", "cold start, TP2xPP2"))
    assert metrics(stopped) == metrics(straight)
    assert samples(stopped) == samples(straight)
    weights = [(run / "export" / "model.safetensors").read_bytes() for run in (stopped, straight)]
    assert weights[0] == weights[1]
