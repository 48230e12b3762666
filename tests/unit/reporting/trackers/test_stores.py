"""The trackers with their real packages, offline; what they stored is read back. Skipped where one is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tracked_run import FINISHED, FIRST, RESULT, SECOND, STOPPED, play
from tracker_stores import Stored, mlflow_runs, tensorboard_run, trackio_runs, wandb_runs

from mergeopd.recipe.plan import Plan
from mergeopd.recipe.resolve import read
from mergeopd.recipe.trackers import Mlflow, TensorBoard, Tracker, Trackio, Wandb
from mergeopd.reporting.trackers.reporter import trackers_of


@pytest.fixture
def plan(write_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Plan:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when trackio is imported
    monkeypatch.chdir(tmp_path)
    plan = read(write_job()).plan
    assert plan is not None
    return plan


def settings_of(kind: str, folder: Path) -> Tracker:
    return {
        "wandb": Wandb(kind="wandb", project="merges", group="g", tags=("a",), offline=True),
        "mlflow": Mlflow(
            kind="mlflow", experiment="merges", url=f"sqlite:///{folder}/mlflow.db", tags={"team": "nlp"}
        ),
        "trackio": Trackio(kind="trackio", project=f"merges-{folder.parent.name}"),
        "tensorboard": TensorBoard(kind="tensorboard"),
    }[kind]


def stored(kind: str, folder: Path) -> list[Stored]:
    """All runs that a tracker has."""
    match settings_of(kind, folder):
        case Wandb():
            import wandb

            wandb.teardown()  # as at the end of a process: its service writes the file
            return wandb_runs(folder)
        case Mlflow(url=url, experiment=experiment):
            return mlflow_runs(str(url), experiment)
        case Trackio(project=project):
            from trackio.utils import TRACKIO_DIR

            return trackio_runs(TRACKIO_DIR / f"{project}.db")
        case _:
            return [tensorboard_run(folder / "tensorboard")]


@pytest.mark.parametrize("kind", ["wandb", "mlflow", "trackio", "tensorboard"])
def test_a_stopped_and_resumed_run_is_one_run_in_the_tracker(kind: str, tmp_path: Path, plan: Plan) -> None:
    pytest.importorskip(kind)
    folder = tmp_path / "run"
    folder.mkdir()
    trackers = [trackers_of((settings_of(kind, folder),)) for _ in range(2)]
    notes = play(folder, plan, trackers[0], FIRST, error=STOPPED)
    (before,) = stored(kind, folder)
    assert before.status in {"wandb": ("preempting 1",), "mlflow": ("KILLED",)}.get(kind, ("",))
    notes += play(folder, plan, trackers[1], (*SECOND, FINISHED), resumed_at=2)
    assert len(notes) == 2, notes  # where the run is, from each process
    runs = stored(kind, folder)
    # W&B cannot resume an offline run: the second process has written all of it again.
    assert len(runs) == (2 if kind == "wandb" else 1)
    run = runs[-1]
    # Update 3 was made twice.
    of_update_3 = 0.125 if kind in ("mlflow", "trackio") else 9.0
    assert run.values["update/loss"] == [(1, 0.5), (2, 0.25), (3, of_update_3), (4, 0.0625)]
    assert run.values["accuracy/math"] == [(0, 0.25), (2, 0.375), (4, 0.5)]
    assert run.values["teacher_reverse_kl/math"] == [(step, 0.25) for step in (1, 2, 3, 4)]
    ((title, text),) = run.alerts
    assert title == "starved math"
    assert "share 1 %; responses are short; raise `share`" in text
    _check_result(kind, run)
    if kind == "mlflow":
        assert run.config["phases.0.name"] == plan.phases[0].name
        assert run.summary["team"] == "nlp"
    elif kind != "tensorboard":  # it has no configuration
        assert run.config["phases"][0]["name"] == plan.phases[0].name
        assert run.config["student"]["model"] == "base"


def _check_result(kind: str, run: Stored) -> None:
    low = RESULT.suites["math"].accuracy["merged"].low
    if kind == "wandb":
        assert run.summary["result/math/merged_low"] == low
    else:
        assert run.values["result/math/merged_low"] == [(4, pytest.approx(low))]
    verdict = run.summary.get("verdict") or run.summary.get("result/verdict") or run.values["verdict"][0][1]
    assert verdict == RESULT.verdict
    assert run.status in {"wandb": ("0",), "mlflow": ("FINISHED",)}.get(kind, ("",))
