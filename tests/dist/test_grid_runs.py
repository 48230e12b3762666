"""Compare whole runs on gloo grids with runs in one process: every metric, response and weight."""

from __future__ import annotations

import json
import sys

import pytest
from grid_jobs import GRIDS, LONG, SHORT
from grid_runs import MODELS, OF_THE_WAY, ROUTES, WORDS, assert_same_figures, lines, metrics, weights_gap
from ranks import needs_megatron

from mergeopd.models.checkpoint import Checkpoint

pytestmark = [
    needs_megatron,
    pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's"),
]

long = pytest.mark.long
CASES = [*SHORT, *(pytest.param(*case, marks=long) for case in LONG)]


def follows(folder, name, expected, student="base"):
    """Compare metrics, student and result of a run with those of another folder."""
    actual = folder / "runs" / name
    assert_same_figures(actual, expected)
    assert weights_gap(actual / "export", expected / "export", folder / student) <= OF_THE_WAY
    results = [run / "result.json" for run in (actual, expected)]
    if results[1].exists():
        measured, wanted = (json.loads(path.read_text())["suites"] for path in results)
        assert measured == wanted
        assert lines(actual / "accuracy.jsonl") == lines(expected / "accuracy.jsonl")


@pytest.mark.parametrize(("recipe", "grid"), CASES)
def test_a_run_on_a_grid_equals_one_process(grid_folder, single_process_run, errors_of, recipe, grid):
    launch = "short" if (recipe, grid) in SHORT else "four"
    name = f"{recipe}, {grid}"
    assert errors_of(launch)[name] == [None] * GRIDS[grid][2]
    student = json.loads((grid_folder / f"{recipe}.recipe.yaml").read_text())["student"]["model"]
    follows(grid_folder, name, single_process_run(recipe), student)


def stops(updates):
    return (
        f"UpdateLimitReached: stopped by --updates after {updates} of 6 updates, all saved; "
        "run the same command to resume"
    )


def assert_continued(folder, name, expected):
    """Compare a run that changed grids with an expected one; the losses to 1e-6."""
    follows(folder, name, expected)
    curve = [line["loss"] for line in metrics(folder / "runs" / name)]
    assert curve == pytest.approx([line["loss"] for line in metrics(expected)], rel=1e-6, abs=0)


def test_a_stopped_run_continues_on_another_grid(grid_folder, single_process_run, errors_of):
    name = "stopped in rollout, on TP2xDP2"
    assert errors_of("short")[name] == [None] * 4
    assert_continued(grid_folder, name, single_process_run("cold start"))


@long
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        (
            "chain",
            (
                ("one", "alone", 2),
                ("four", "DP4", 3),
                ("four", "TP2xCP2", 4),
                ("four", "PP2xDP2", 5),
                ("four", "TP2xPP2", None),
            ),
        ),
        ("shards", (("four", "FSDP4", 2), ("four", "FSDP2x2", 4), ("four", "FSDP4 layers packed", None))),
    ],
)
def test_a_run_continues_on_one_grid_after_another(grid_folder, single_process_run, errors_of, name, steps):
    for launch, grid, updates in steps:
        end = None if updates is None else stops(updates)
        assert errors_of(launch)[f"{name}, {grid}"] == [end] * GRIDS[grid][2]
    assert_continued(grid_folder, name, single_process_run("cold start"))


def test_processes_of_two_machines_read_each_byte_of_a_teacher_once(
    grid_folder, single_process_run, errors_of
):
    """In each round, all ranks read every body once, and both ranks of the last stage their rows of the head."""
    assert errors_of("short")["stages apart"] == [None] * 4
    follows(grid_folder, "stages apart", single_process_run("counted"))
    per_round = 0
    for name in {next(iter(teachers)) for teachers in ROUTES.values()}:
        checkpoint = Checkpoint.open(grid_folder / name)
        sizes = {tensor: info.num_bytes for tensor, info in checkpoint.tensors.items()}
        head = sizes.pop("lm_head.weight") if not MODELS[name][1] else sizes["model.embed_tokens.weight"]
        per_round += sum(sizes.values()) + 4 * checkpoint.header_bytes
        per_round += head // MODELS[name][2] * len(WORDS)
    read = [
        line["cost"]["teacher_bytes_read"]
        for line in lines(grid_folder / "runs" / "stages apart" / "metrics.jsonl")
    ]
    assert read == [per_round, 2 * per_round]


@long
@pytest.mark.parametrize(("name", "recipe"), [("copies apart", "mixed"), ("selves, all apart", "selves")])
def test_transfers_between_machines_change_nothing(grid_folder, single_process_run, errors_of, name, recipe):
    assert errors_of("four")[name] == [None] * 4
    follows(grid_folder, name, single_process_run(recipe))
