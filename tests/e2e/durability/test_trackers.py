"""A run with W&B that is interrupted: nothing of W&B outlives the process, and it has every update in the end."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tracker_stores import wandb_runs

FAULT = Path(__file__).parents[3] / "tools" / "fault.py"
TRACKERS = "report.trackers=[{kind: wandb, offline: true}]"


def wait_for_the_end_of_services(parent: int, limit_s: float) -> None:
    """Wait until no service process of wandb belongs to `parent`, which has ended."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if not words[0].endswith(b"wandb-core") or str(parent).encode() not in words:
                continue
            ended = select.poll()
            ended.register(os.pidfd_open(int(folder.name)), select.POLLIN)
        except OSError:
            continue  # it has ended meanwhile
        assert ended.poll(1000 * limit_s), "a process of wandb outlives the run"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_wandb_ends_with_an_interrupted_run_and_has_all_of_it(runs: Any, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    environment = {**os.environ, "COLUMNS": "300", "WANDB_ERROR_REPORTING": "false"}
    # Ctrl-C after update 2, a kill after update 5, which is repeated from the checkpoint of update 4.
    for fault, code in (("update:2:INT", 3), ("update:4:KILL", -9), (None, 0)):
        command = [*runs.command("tracked"), "--set", TRACKERS]
        launch = [str(FAULT), fault, *command] if fault else ["-m", "mergeopd", *command]
        process = subprocess.Popen(
            [sys.executable, *launch],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == code, printed
        wait_for_the_end_of_services(process.pid, 0 if code == 3 else 20)
        assert "no more" not in printed
    folder = runs.folder("tracked")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    whole = wandb_runs(folder)[-1]
    assert whole.status == "0"
    assert whole.values["update/loss"] == [(line["update"], line["loss"]) for line in lines]
    assert [step for step, _ in whole.values["update/loss"]] == [1, 2, 3, 4, 5, 6]
    result = json.loads((folder / "result.json").read_text())
    assert whole.summary["verdict"] == result["verdict"]
