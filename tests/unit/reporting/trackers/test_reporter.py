"""What trackers get, compared with the run folder: order, resumed runs, failures."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from tracked_run import ALARM, FINISHED, FIRST, RESULT, SECOND, STOPPED, UPDATE, play, update

from mergeopd.recipe.plan import Plan
from mergeopd.recipe.resolve import read
from mergeopd.reporting.events import AlarmRaised
from mergeopd.reporting.jsonl import UpdateRecord
from mergeopd.reporting.trackers.protocol import NO_STEP, Opened, Outcome, TrackedRun
from mergeopd.reporting.trackers.values import config_values, flat, result_values, update_values


@dataclass
class Fake:
    """A tracker that keeps what it gets. `fails_at` is a step at which it raises, `blocks` its start waits for."""

    last_step: int = NO_STEP
    fails_at: int | None = None
    blocks: threading.Event | None = None
    title: str = "Fake"
    runs: list[TrackedRun] = field(default_factory=list)
    logged: list[tuple[int, Mapping[str, float]]] = field(default_factory=list)
    alarms: list[AlarmRaised] = field(default_factory=list)
    result: tuple[Mapping[str, float], str, int] | None = None
    outcome: Outcome | None = None

    def start(self, run: TrackedRun) -> Opened:
        self.runs.append(run)
        if self.blocks is not None:
            self.blocks.wait()
        return Opened(self.last_step, "here")

    def log(self, values: Mapping[str, float], step: int) -> None:
        if step == self.fails_at:
            raise KeyError("no such project\nand many lines")
        self.logged.append((step, values))

    def alert(self, alarm: AlarmRaised) -> None:
        self.alarms.append(alarm)

    def summarize(self, values: Mapping[str, float], verdict: str, step: int) -> None:
        self.result = values, verdict, step

    def finish(self, outcome: Outcome) -> None:
        self.outcome = outcome


@pytest.fixture
def plan(write_job: Callable[..., Path]) -> Plan:
    plan = read(write_job()).plan
    assert plan is not None
    return plan


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for part in value.values():
            yield from numbers(part)
    elif isinstance(value, int | float):
        yield value


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_trackers_get_every_number_of_the_run_folder_in_order(tmp_path: Path, plan: Plan) -> None:
    tracker = Fake()
    notes = play(tmp_path / "run", plan, (tracker,), (*FIRST, update(4, 0.1), FINISHED))
    assert notes == ["Fake: here"]
    assert [(step, *values) for step, values in tracker.logged if len(values) == 1] == [
        (0, "accuracy/math"),
        (2, "accuracy/math"),
    ]
    updates = [(step, values) for step, values in tracker.logged if len(values) > 1]
    records = lines(tmp_path / "run/metrics.jsonl")
    assert [step for step, _ in updates] == [record["update"] for record in records] == [1, 2, 3, 4]
    for (_, values), record in zip(updates, records, strict=True):
        assert sorted(values.values()) == sorted(numbers({**record, "update": None}))
        assert values["teacher_reverse_kl/math"] == record["teachers"]["math"]["reverse_kl"]
        assert values["domain_nll/math"] == record["domains"]["math"]["nll"]
        assert values["update/loss"] == record["loss"]
        assert values["policy/importance_weight"] == record["policy"]["importance_weight"]
        assert values["verifier_failures/code (2)"] == 2
        assert values["seconds/rollout"] == 1.0
        assert values["cost/tokens_per_s"] == 200.0
    assert tracker.alarms == [ALARM]
    assert tracker.outcome == "finished"
    assert tracker.result is not None
    values, verdict, step = tracker.result
    assert (verdict, step) == (RESULT.verdict, 4)
    assert values["result/math/merged"] == 0.5
    assert values["result/math/merged_low"] == RESULT.suites["math"].accuracy["merged"].low
    assert values["result_mean/recovered"] == 0.5


@pytest.mark.parametrize(
    ("last_step", "expected"),
    [
        (3, [(4, 0.0625)]),  # update 3 was stored before the interruption
        (2, [(3, 9.0), (4, 0.0625)]),
        (1, [(2, 0.25), (3, 9.0), (4, 0.0625)]),  # it failed, or was interrupted before it had sent update 2
        (NO_STEP, [(1, 0.5), (2, 0.25), (3, 9.0), (4, 0.0625)]),  # it is new
    ],
)
def test_a_resumed_run_stores_each_update_once(
    tmp_path: Path, plan: Plan, last_step: int, expected: list[tuple[int, float]]
) -> None:
    first, second = Fake(), Fake(last_step)
    play(tmp_path / "run", plan, (first,), FIRST, error=STOPPED)
    assert first.outcome == "stopped"
    play(tmp_path / "run", plan, (second,), (*SECOND, FINISHED), resumed_at=2)
    losses = [(step, values["update/loss"]) for step, values in second.logged if "update/loss" in values]
    assert losses == expected
    measured = [step for step, values in second.logged if "accuracy/math" in values]
    assert measured == [step for step in (0, 2, 4) if step > last_step]
    assert second.alarms == ([ALARM] if last_step < 3 else [])
    assert first.runs[0].id == second.runs[0].id
    assert (first.runs[0].resumed_at, second.runs[0].resumed_at) == (0, 2)


def test_a_tracker_that_fails_costs_a_note_and_nothing_else(tmp_path: Path, plan: Plan) -> None:
    failing, other = Fake(fails_at=2, title="W&B"), Fake()
    notes = play(tmp_path / "run", plan, (failing, other), FIRST, error=ValueError("bug"))
    assert sorted(notes) == [
        "Fake: here",
        "W&B gets no more of this run: 'no such project\\nand many lines'",
        "W&B: here",
    ]
    assert [step for step, _ in failing.logged] == [0, 1]
    assert [step for step, _ in other.logged] == [0, 1, 2, 2, 3]
    assert (failing.outcome, other.outcome) == (None, "failed")


def test_a_tracker_that_hangs_does_not_keep_the_run_from_ending(tmp_path: Path, plan: Plan) -> None:
    release = threading.Event()
    hanging = Fake(blocks=release)
    (note,) = play(tmp_path / "run", plan, (hanging,), (*FIRST, FINISHED), finish_timeout_s=0.01)
    assert note.startswith("Fake: not done after 0 s")
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "tracker Fake")
    assert thread.daemon  # the interpreter does not wait for it
    release.set()
    thread.join()
    assert hanging.outcome == "finished"


def test_values_that_are_missing_are_left_out() -> None:
    record = UpdateRecord.of(replace(UPDATE, loss=math.nan, seconds={}, policy=None))
    values = update_values(record)
    assert math.isnan(values["update/loss"])
    assert "cost/tokens_per_s" not in values
    assert "teacher_entropy_T/math" not in values
    assert not any(name.startswith("policy/") for name in values)
    assert "result/math/static_merge" not in result_values(RESULT)  # no static merge was measured


def test_the_config_is_the_plan_without_folders_of_the_user(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path.parent / f"{tmp_path.name}-hub" / "models--Qwen--Qwen3-0.6B" / "snapshots" / "ab12"
    snapshot.mkdir(parents=True)
    student = plan.student.model_copy(update={"model": str(snapshot)})
    config = config_values(plan.model_copy(update={"student": student}))
    assert config["student"]["model"] == "Qwen/Qwen3-0.6B"
    assert config["teachers"]["one"]["model"] == "one"
    assert config["sources"][0]["source"] == "left.jsonl"
    leaves = flat(config)
    assert leaves["phases.0.name"] == plan.phases[0].name
    assert str(tmp_path.parent) not in json.dumps(config)
    assert not any(isinstance(value, str) and os.path.isabs(value) for value in leaves.values())


def test_trackers_do_not_change_the_identity_of_a_run(
    write_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergeopd.recipe.checks.is_installed", lambda name: True)
    recipe = write_job()
    plans = [read(recipe, [f"report.trackers={value}"]).plan for value in ("[wandb, tensorboard]", "[]")]
    assert plans[0] is not None
    assert plans[1] is not None
    assert [tracker.kind for tracker in plans[0].report.trackers] == ["wandb", "tensorboard"]
    assert plans[0].hash == plans[1].hash


def test_a_folder_of_runs_is_not_the_package(
    write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()  # as wandb makes where it is used
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    (problem,) = read(write_job({"report": {"trackers": ["wandb"]}})).problems
    assert problem.message == "the package wandb is not installed"
