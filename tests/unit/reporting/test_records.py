"""Files for programs: lines of metrics.jsonl, and result.json."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from results import result_of

from mergeopd.errors import StorageError
from mergeopd.reporting.events import (
    CheckpointSaved,
    DomainStats,
    Note,
    PolicyStats,
    Reporters,
    ServingStats,
    TeacherStats,
    UpdateDone,
)
from mergeopd.reporting.jsonl import RecordsReporter, UpdateRecord, update_record
from mergeopd.reporting.result import read_result, write_result
from mergeopd.storage.metrics import MetricsFile

UPDATE = UpdateDone(
    update=3,
    phase="merge",
    round=1,
    lr=3e-4,
    loss=0.1 + 0.2,
    grad_norm=math.inf,
    num_tokens=600,
    on_policy_fraction=1.0,
    teachers={
        "sort": TeacherStats(
            200,
            {"reverse_kl": 0.25},
            -0.125,
            0.5,
            logprob_gap_student=-0.125,
            overlap=0.625,
            overlap_advantage=-0.25,
            entropy_gap=0.375,
            shared_mass_S=0.75,
            shared_mass_T=0.875,
        ),
        "math": TeacherStats(400, {"reverse_kl": math.nan, "forward_kl": 0.75}, 0.0625, logprob_gap_text=0.5),
    },
    domains={"math": DomainStats(4, 400, 100.0, 2 / 3, 0.75, 1.5, 0.9, 0.25, 0.5, 0.88, 0.125)},
    seconds={"update": 2.0, "rollout": 1.0, "text": 30.0},
    teacher_bytes_read=4096,
    peak_memory_bytes=2**30,
    num_generated={"student": 640},
    flops={"update": 3e12, "rollout": 1e12},
    policy=PolicyStats(0.125, 0.0, 0.9, 0.01, 0.5),
    verifier_failures={"code": 2},
    text_kept={"sort": {"sort": 0.5}, "math": {"math": 0.25}},
    selected={"math": 0.75},
    clip_factor=0.4,
    serving=ServingStats(4.0, 3.0, 0.5, 1.0, 1, 2, 3, 0, 0.001, 0.25),
)


def test_a_line_holds_every_figure_once_and_costs_apart(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        reporter = RecordsReporter(
            file, *(MetricsFile(tmp_path / f"{name}.jsonl") for name in ("samples", "accuracy", "alarms"))
        )
        for event in (Note("x"), UPDATE, CheckpointSaved(3, tmp_path)):
            reporter.emit(event)
    (line,) = path.read_text().splitlines()
    assert json.loads(line) == {
        "update": 3, "phase": "merge", "round": 1, "lr": 3e-4, "loss": 0.30000000000000004, "grad_norm": None,
        "clip_factor": 0.4,
        "num_tokens": 600, "on_policy_fraction": 1.0,
        "teachers": {
            "math": {"num_tokens": 400, "forward_kl": 0.75, "reverse_kl": None, "logprob_gap": 0.0625,
                     "logprob_gap_student": None, "logprob_gap_text": 0.5},
            "sort": {"num_tokens": 200, "reverse_kl": 0.25, "logprob_gap": -0.125,
                     "logprob_gap_student": -0.125, "logprob_gap_text": None, "entropy_T": 0.5,
                     "entropy_gap": 0.375, "overlap": 0.625, "overlap_advantage": -0.25,
                     "shared_mass_S": 0.75, "shared_mass_T": 0.875},
        },
        "domains": {"math": {"num_rollouts": 4, "num_tokens": 400, "mean_length": 100.0, "token_share": 2 / 3,
                             "weight": 0.75, "loss_share": 0.88, "nll": 1.5, "entropy_S": 0.9, "reward": 0.5,
                             "truncated_fraction": 0.25, "repetition": 0.125, "mean_turns": None,
                                 "mean_calls": None, "failed_call_fraction": None}},
        "policy": {"corrected_fraction": 0.125, "clipped_fraction": 0.0, "importance_weight": 0.9,
                   "rollout_logprob_gap": 0.01, "rollout_logprob_gap_max": 0.5, "zero_advantage_fraction": None},
        "verifier_failures": {"code": 2},
        "serving": {"generation_s": 4.0, "wait_s": 3.0, "sync_s": 0.5, "lag": 1.0, "lag_max": 1, "num_retries": 2, "num_stale": 3,
                    "num_lost": 0, "engine_gap": 0.001, "engine_gap_max": 0.25, "engine_kl": None},
        "cost": {"seconds": {"rollout": 1.0, "text": 30.0, "update": 2.0}, "tokens_per_s": 200.0,
                 "teacher_bytes_read": 4096, "peak_memory_bytes": 2**30, "num_generated": {"student": 640},
                 "flops": {"rollout": 1e12, "update": 3e12}},
        "text_kept": {"math": {"math": 0.25}, "sort": {"sort": 0.5}}, "selected": {"math": 0.75},
    }  # fmt: skip


def test_lines_are_read_back_through_the_type_that_writes_them(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        file.append(update_record(UPDATE))
    read = TypeAdapter(UpdateRecord).validate_json((tmp_path / "metrics.jsonl").read_bytes())
    written = UpdateRecord.of(UPDATE)
    teachers = {**written.teachers, "math": {**written.teachers["math"], "reverse_kl": None}}  # not finite
    assert read == replace(written, grad_norm=None, teachers=teachers)


def test_no_field_of_the_event_is_forgotten() -> None:
    record = update_record(UPDATE)
    cost = record["cost"]
    for name in UpdateDone.__dataclass_fields__:
        assert name in record or name in cost, name
    for name in DomainStats.__dataclass_fields__:
        assert name in record["domains"]["math"], name


def test_lines_do_not_depend_on_the_order_of_teachers_nor_costs_on_the_rest() -> None:
    turned = replace(
        UPDATE, teachers=dict(reversed(UPDATE.teachers.items())), seconds={}, teacher_bytes_read=0, flops={}
    )
    one, two = update_record(UPDATE), update_record(turned)
    assert (two["cost"]["seconds"], two["cost"]["flops"]) == ({}, {})
    for line in (one, two):
        line.pop("cost")
    assert json.dumps(one) == json.dumps(two)


def test_reporters_pass_on_in_order() -> None:
    seen: list[tuple[str, object]] = []

    class Probe:
        def __init__(self, name: str) -> None:
            self.name = name

        def emit(self, event: object) -> None:
            seen.append((self.name, event))

    Reporters(Probe("a"), Probe("b")).emit(UPDATE)
    assert seen == [("a", UPDATE), ("b", UPDATE)]


def test_result_file(tmp_path: Path) -> None:
    result = result_of({"math": {"base": 0.0, "expert/one": 1.0, "merged": 0.4}}, {"rollout": 0.1})
    path = tmp_path / "run" / "result.json"
    assert read_result(path) is None
    write_result(path, result)
    assert json.loads(path.read_text()) == json.loads(json.dumps(asdict(result)))
    assert read_result(path) == result
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"^is of another version of mergeopd$"):
        read_result(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"^is damaged$"):
        read_result(path)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        write_result(tmp_path / "file" / "result.json", result)


def test_speed_leaves_out_what_does_not_recur() -> None:
    seconds = {"startup": 9.0, "text": 30.0, "interim": 5.0, "rollout": 1.0, "update": 2.0}
    assert replace(UPDATE, seconds=seconds).step_s == 3.0
