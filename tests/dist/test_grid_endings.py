"""Failed and stopped runs on gloo grids: the error of every rank, and resuming with the same command."""

from __future__ import annotations

import re
import sys

import pytest
from grid_jobs import LONG_BROKEN, SHORT_BROKEN, single_process_error
from grid_runs import assert_same_figures, metrics, samples
from ranks import needs_megatron

pytestmark = [
    needs_megatron,
    pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's"),
]

PEER_FAILED = "PeerFailed: another process of the run ended"


# First words of the error, by recipe.
BEGINNINGS = {
    "NaN in a body": "TeacherError: teacher 'one' produced NaN",
    "NaN in a head": "NumericsError: the logits of target",
    "uniform": "TeacherError: teacher 'two' gives all 11 tokens the same",
    "canary": "TeacherError: teacher 'three' is not the model its card describes",
    "canary of a writer": "TeacherError: teacher 'three' is not the model its card describes",
}
# Number of ranks that raise it: one verifies the cards; of other errors it may be all or some.
RAISED_BY = {"canary": 1, "canary of a writer": 1}


@pytest.mark.parametrize(
    ("recipe", "grid"),
    [*SHORT_BROKEN, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG_BROKEN)],
)
def test_an_error_equals_that_of_one_process_and_ends_all_ranks(grid_folder, errors_of, recipe, grid):
    errors = errors_of("short" if (recipe, grid) in SHORT_BROKEN else "four")[f"{recipe}, {grid}"]
    expected = single_process_error(grid_folder / f"{recipe}.recipe.yaml")
    assert expected.startswith(BEGINNINGS[recipe])
    if recipe == "NaN in a head":  # the message has the tokens of the micro-batch
        assert len(set(errors)) == 1
        pattern = r"NumericsError: the logits of target \d: not finite at .*\(targets: .*two\)"
        assert re.fullmatch(pattern, errors[0])
        return
    assert set(errors) <= {expected, PEER_FAILED}
    assert errors.count(expected) == RAISED_BY.get(recipe, errors.count(expected)) > 0
    assert not (grid_folder / "runs" / f"{recipe}, {grid}" / "checkpoints").exists()


ALL_SAVED = "all saved; run the same command to resume"
NONE_SAVED = "before the first checkpoint; run the same command to start again"
MEASURED = "during evaluation; training and export are saved; run the same command to evaluate again"


@pytest.mark.parametrize(
    ("stage", "launch", "rest"),
    [
        ("rollout", "short", f"after 4 of 6 updates, {ALL_SAVED}"),
        pytest.param("text", "four", f"after 0 of 6 updates, {NONE_SAVED}", marks=pytest.mark.long),
        pytest.param("evaluation", "four", MEASURED, marks=pytest.mark.long),
    ],
)
def test_a_signal_to_one_rank_stops_all_within_a_stage_and_they_resume(
    grid_folder, single_process_run, errors_of, stage, launch, rest
):
    name = f"stopped in {stage}"
    assert errors_of(launch)[name] == [f"Stopped: stopped by SIGTERM {rest}"] * 4
    assert errors_of(launch)[f"{name}, again"] == [None] * 4
    assert_same_figures(grid_folder / "runs" / name, single_process_run("cold start"))


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(grid_folder, errors_of):
    assert (
        errors_of("short")["stopped in rollout, again"]
        == errors_of("short")["cold start, TP2xPP2"]
        == [None] * 4
    )
    runs = [grid_folder / "runs" / name for name in ("stopped in rollout", "cold start, TP2xPP2")]
    for read in (metrics, samples):
        assert read(runs[0]) == read(runs[1])
    weights = [(run / "export" / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
