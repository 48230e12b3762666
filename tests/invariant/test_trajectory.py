"""Twenty updates on recorded answers: losses and gradient norms as they were, and as they are on a grid.

Change them on purpose with MERGEOPD_WRITE_EXPECTED=1 (and look at the difference): see `recorded`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from grid_runs import (
    OF_THE_WAY,
    assert_same_figures,
    metrics,
    run_alone,
    weights_gap,
    write_grid_job,
    write_recipe,
)
from ranks import run_ranks

EXPECTED = Path(__file__).with_name("trajectory.json")
WORKER = Path(__file__).parents[1] / "dist" / "run_worker.py"
DEADLINE_S = 300
# Another processor sums in another order, and AdamW makes whole steps of small gradients.
ELSEWHERE = 1e-4
# Nothing is sampled: the answers are the prompt files' own.
RECIPE = {
    "phases": [
        {
            "name": "tokens",
            "text": "dataset",
            "updates": 10,
            "prompts_per_round": 9,
            "loss": {"reverse_kl": 1.0, "forward_kl": 0.3, "nll": 0.1},
            "balance": {"tokens": "equal", "follow_gap": 0.5},
        },
        {
            "name": "answers",
            "text": "dataset",
            "updates": 10,
            "updates_per_round": 2,
            "prompts_per_round": 10,
            "loss": {
                "jsd": {"weight": 1.0, "beta": 0.4},
                "support": {"top_k": 4, "of": "union", "rest": "tail"},
            },
            "reduce": "sequence",
        },
    ],
    "checkpoint": {"every": 20, "keep": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = write_grid_job(tmp_path_factory.mktemp("trajectory"))
    write_recipe(found, "recorded", RECIPE)
    return found


@pytest.fixture(scope="module")
def alone(folder):
    """The run folder of the torch student."""
    run_alone(folder / "recorded.recipe.yaml", f"output={folder / 'alone'}")
    return folder / "alone"


def recorded(run):
    """What is kept of a run: eight digits of the loss and the gradient norm of every update."""
    return {key: [float(f"{line[key]:.8g}") for line in metrics(run)] for key in ("loss", "grad_norm")}


def test_the_torch_student_goes_where_it_went(alone):
    found = recorded(alone)
    if os.environ.get("MERGEOPD_WRITE_EXPECTED"):
        EXPECTED.write_text(json.dumps(found, indent=1) + "\n")
    expected = json.loads(EXPECTED.read_text())
    assert len(expected["loss"]) == 20
    assert max(expected["loss"][:10]) > 1.3 * min(expected["loss"][:10])  # it learns
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=ELSEWHERE, abs=0), key


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's")
def test_a_grid_goes_the_same_way(folder, alone, tmp_path):
    pytest.importorskip("megatron.core", reason="the extra mergeopd[megatron] is not installed")
    overrides = [
        "student.backend=megatron",
        'student.parallel={"tensor": 2, "pipeline": 2}',
        f"output={folder / 'grid'}",
    ]
    job = {"name": "recorded", "recipe": str(folder / "recorded.recipe.yaml"), "overrides": overrides}
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    outputs = run_ranks(WORKER, 4, tmp_path, str(tmp_path / "jobs.json"), deadline_s=DEADLINE_S)
    assert [json.loads(out.read_text()) for out in outputs] == [{"recorded": {"error": None}}] * 4
    assert_same_figures(folder / "grid", alone)
    assert weights_gap(folder / "grid" / "export", alone / "export", folder / "base") <= OF_THE_WAY
