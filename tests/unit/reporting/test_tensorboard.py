"""Events for TensorBoard: the numbers of metrics.jsonl, each update once also after an interruption."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mergeopd.recipe.resolve import read
from mergeopd.reporting.events import (
    DomainStats,
    Event,
    Note,
    PolicyStats,
    RunStarted,
    TeacherStats,
    UpdateDone,
)
from mergeopd.reporting.tensorboard import TensorBoardReporter, scalars

UPDATE = UpdateDone(
    update=1,
    phase="merge",
    round=0,
    lr=3e-4,
    loss=0.5,
    grad_norm=2.0,
    num_tokens=600,
    on_policy_fraction=1.0,
    teachers={"math": TeacherStats(400, {"reverse_kl": 0.25, "jsd": 0.125}, 0.0625)},
    domains={"math": DomainStats(4, 400, 100.0, 2 / 3, 0.75, 1.5, 0.9, 0.25)},
    seconds={"update": 2.0, "rollout": 1.0},
    teacher_bytes_read=4096,
)
WANTED = {
    "update/loss": 0.5,
    "update/lr": 3e-4,
    "update/grad_norm": 2.0,
    "update/num_tokens": 600,
    "update/on_policy_fraction": 1.0,
    "teacher_num_tokens/math": 400,
    "teacher_reverse_kl/math": 0.25,
    "teacher_jsd/math": 0.125,
    "teacher_logprob_gap/math": 0.0625,
    "domain_num_rollouts/math": 4,
    "domain_num_tokens/math": 400,
    "domain_mean_length/math": 100.0,
    "domain_token_share/math": 2 / 3,
    "domain_weight/math": 0.75,
    "domain_nll/math": 1.5,
    "domain_entropy_S/math": 0.9,
    "domain_truncated_fraction/math": 0.25,
    "seconds/rollout": 1.0,
    "seconds/update": 2.0,
    "cost/tokens_per_s": 200.0,
    "cost/teacher_bytes_read": 4096,
}
needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None,
    reason="the package tensorboard is not installed (pip install 'mergeopd[tensorboard]')",
)


class Notes:
    def __init__(self) -> None:
        self.told: list[Event] = []

    def emit(self, event: Event) -> None:
        self.told.append(event)


def started(num_done: int) -> RunStarted:
    return RunStarted("x", "x.yaml", 9, (("merge", 9),), ("math",), ("math",), Path("run"), num_done)


def test_every_number_has_a_tag() -> None:
    assert dict(scalars(UPDATE)) == WANTED
    with_reward = replace(UPDATE, domains={"math": replace(UPDATE.domains["math"], reward=0.5)})
    assert dict(scalars(with_reward)) == {**WANTED, "domain_reward/math": 0.5}
    with_policy = replace(UPDATE, policy=PolicyStats(0.125, 0.25, 1.5, 0.01, 0.5, None))
    assert dict(scalars(with_policy)) == {
        **WANTED,
        "policy/corrected_fraction": 0.125,
        "policy/clipped_fraction": 0.25,
        "policy/importance_weight": 1.5,
        "policy/rollout_logprob_gap": 0.01,
        "policy/rollout_logprob_gap_max": 0.5,
    }


@needs_tensorboard
def test_an_update_made_again_is_shown_once(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensorboard's own
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    losses = {1: 0.5, 2: 0.25, 3: math.nan}
    for num_done, offset in ((0, 0.0), (1, 1.0)):  # the second process resumes after update 1
        reporter = TensorBoardReporter(tmp_path / "tensorboard", Notes())
        reporter.emit(started(num_done))
        for update in range(num_done + 1, 4):
            reporter.emit(replace(UPDATE, update=update, loss=losses[update] + offset))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(WANTED)
    values = [(event.step, event.value) for event in events.Scalars("update/loss")]
    assert values[:2] == [(1, 0.5), (2, 1.25)]
    assert [step for step, _ in values] == [1, 2, 3]
    assert math.isnan(values[2][1])


@needs_tensorboard
def test_a_disk_that_refuses_costs_the_events_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    notes = Notes()
    reporter = TensorBoardReporter(tmp_path / "tensorboard", notes)
    for event in (started(0), UPDATE, UPDATE):
        reporter.emit(event)
    assert len(notes.told) == 1
    assert isinstance(notes.told[0], Note)
    assert notes.told[0].text.startswith("no more events for TensorBoard: ")


def test_check_asks_for_the_package(write_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_job({"report": {"tensorboard": True}})
    monkeypatch.setattr("mergeopd.recipe.checks.find_spec", lambda name: None)
    (problem,) = read(recipe).problems
    assert problem.path == "report.tensorboard"
    assert problem.message == "the package tensorboard is not installed"
    assert read(recipe, ["report.tensorboard=false"]).problems == ()


def test_the_setting_does_not_change_the_identity_of_a_run(
    write_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergeopd.recipe.checks.find_spec", lambda name: object())
    recipe = write_job()
    plans = [read(recipe, [f"report.tensorboard={value}"]).plan for value in ("true", "false")]
    assert plans[0] is not None
    assert plans[1] is not None
    assert plans[0].report != plans[1].report
    assert plans[0].hash == plans[1].hash
