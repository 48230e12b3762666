"""Twenty updates on recorded responses: losses and gradient norms equal the recorded ones. `test_grid_runs.py` has them on a grid.

Change them on purpose with MERGEOPD_WRITE_EXPECTED=1 (and look at the difference): see `recorded`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from grid_runs import metrics, run_alone, write_grid_job

EXPECTED = Path(__file__).with_name("trajectory.json")
# Another processor sums in another order, and AdamW makes whole steps of small gradients.
ELSEWHERE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_grid_job(tmp_path_factory.mktemp("trajectory"))


@pytest.fixture(scope="module")
def alone(folder):
    """The run folder of the torch student."""
    run_alone(folder / "recorded.recipe.yaml", f"output={folder / 'alone'}")
    return folder / "alone"


def recorded(run):
    """Loss and gradient norm of every update, to eight digits."""
    return {key: [float(f"{line[key]:.8g}") for line in metrics(run)] for key in ("loss", "grad_norm")}


def test_the_torch_student_repeats_the_recorded_trajectory(alone):
    actual = recorded(alone)
    if os.environ.get("MERGEOPD_WRITE_EXPECTED"):
        EXPECTED.write_text(json.dumps(actual, indent=1) + "\n")
    expected = json.loads(EXPECTED.read_text())
    assert len(expected["loss"]) == 20
    assert max(expected["loss"][:10]) > 1.3 * min(expected["loss"][:10])  # it learns
    for key, values in expected.items():
        assert actual[key] == pytest.approx(values, rel=ELSEWHERE, abs=0), key
