"""SIGTERM, Ctrl-C and --updates: the run is saved, the exit code is 3, the same command resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

FAULT = Path(__file__).parents[3] / "tools" / "fault.py"

# Place of the request, number of saved updates, and message.
REQUESTS = {
    "text:2:TERM": (0, "SIGTERM after 0 of 6 updates"),
    "rollout:70:TERM": (5, "SIGTERM after 5 of 6 updates"),
    "scoring:40:INT": (2, "SIGINT after 2 of 6 updates"),
    "gradient:3:TERM": (
        1,
        "SIGTERM after 1 of 6 updates",
    ),  # the weights are unchanged: the update is abandoned
    "update:3:TERM": (4, "SIGTERM after 4 of 6 updates"),  # the second update of the round is made first
    "files:1:INT": (2, "SIGINT after 2 of 6 updates"),  # the checkpoint is finished
    "evaluation:2:TERM": (6, "SIGTERM during evaluation"),
}


def saved(folder: Path) -> int:
    return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")), default=0)


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_request_to_stop(runs: Any, ends_well: Callable[..., str], request_: str) -> None:
    name = "stopped-" + request_.replace(":", "-")
    num_saved, message = REQUESTS[request_]
    code, printed = runs(name, fault=request_)
    assert code == 3, printed
    assert f"stopped by {message}" in printed
    assert saved(runs.folder(name)) == num_saved
    assert not (runs.folder(name) / "result.json").exists()
    ends_well(name)


def test_teacher_rollouts_made_before_a_stop_are_kept(runs: Any) -> None:
    runs("texts", fault="text:2:TERM")
    [file] = runs.folder("texts-texts").glob("one-*.jsonl")
    # Two of each batch: the request is handled at the end of the second.
    first = file.read_text().splitlines()
    assert len(first) == 4
    runs("texts", "--updates", "1")
    assert file.read_text().splitlines() == first


@pytest.mark.parametrize("place", ["rollout:70", "update:5", "checkpoint:2", "evaluation:1"])
def test_a_second_ctrl_c_stops_at_once(runs: Any, ends_well: Callable[..., str], place: str) -> None:
    name = "twice-" + place.replace(":", "-")
    code, printed = runs(name, fault=f"{place}:INT+INT")
    assert code == 130, printed
    number = saved(runs.folder(name))
    kept = f"Run the same command to resume from the newest checkpoint, of update {number}.\n"
    if place.startswith("evaluation"):
        kept = "Training and export are saved; run the same command to evaluate.\n"
    assert printed.endswith(f"Interrupted. {kept}")
    assert list(runs.folder(name).rglob("*.partial")) == []
    ends_well(name)


def test_a_second_command_is_refused_and_a_signal_stops_the_first(
    runs: Any, ends_well: Callable[..., str]
) -> None:
    """The command in a new interpreter, held in its third rollout; a second command; then SIGTERM."""
    command = [sys.executable, str(FAULT), "rollout:45:STOP", *runs.command("held")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "300"},
    )
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        before = sorted(path.name for path in runs.folder("held").rglob("*"))
        code, printed = runs("held")
        assert code == 1
        assert (
            f"another process (id {process.pid}) is using this run folder; wait for it, stop it, or"
            in printed
        )
        assert sorted(path.name for path in runs.folder("held").rglob("*")) == before
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 3, printed
    assert "stopped by SIGTERM after 4 of 6 updates, all saved; run the same command to resume" in printed
    ends_well("held")


def test_a_run_of_few_updates_resumes(runs: Any, ends_well: Callable[..., str]) -> None:
    for num_done in (1, 2, 4):  # the second round has two updates
        code, printed = runs("smoke", "--updates", "1")
        assert code == 3, printed
        assert f"stopped by --updates after {num_done} of 6 updates" in printed
        assert saved(runs.folder("smoke")) == num_done
    ends_well("smoke", "--updates", "2")


def test_a_run_resumes_with_a_declared_change_and_records_it(runs: Any, undisturbed: dict[str, str]) -> None:
    change = ("--set", "optimizer.lr=0.02")
    assert runs("changed", "--updates", "2")[0] == 3
    code, printed = runs("changed", *change)
    assert code == 1
    assert "optimizer.lr: 0.01 -> 0.02" in printed
    code, printed = runs("changed", *change, "--allow-change", "optimizer.lr")
    assert code == 0, printed
    assert "resumes after update 2" in printed
    record = YAML(typ="safe").load((runs.folder("changed") / "plan.yaml").read_text())
    assert record["declared_changes"] == ["optimizer.lr: 0.01 -> 0.02"]
    assert len(record["earlier_hashes"]) == 1
    lines = (runs.folder("changed") / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert '"lr": 0.02' in lines[2]
    # The plan is now the new one. Once the student is exported, no setting can change.
    assert runs("changed")[0] == 1
    code, printed = runs("changed", *change)
    assert (code, "This run is finished" in printed) == (0, True)
    code, printed = runs("changed", "--allow-change", "optimizer")
    assert code == 1
    assert "has exported its student, so its settings can no longer change" in printed


def test_the_hidden_states_on_disk_change_nothing(runs: Any, ends_well: Callable[..., str]) -> None:
    """With memory for a tenth of the largest round (about 12 kB), and with none."""
    for name, gib in (("tenth", 1.2e3 / 2**30), ("none", 1e-12)):
        ends_well(name, "--set", f"memory.hidden_states_gib={gib}")
        assert list((runs.folder(name) / "spill").iterdir()) == []
