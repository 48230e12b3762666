"""Checkpoints that several gloo ranks write in parallel and in the background, with kills and a full disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("checkpoint_worker.py")
DEADLINE_S = 550


def killed(folder: Path, num_kills: int, seed: int) -> dict[str, object]:
    command = [sys.executable, str(WORKER), str(folder), str(num_kills), str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(result, dict)
    return result


@pytest.mark.parametrize("num_kills", [3, pytest.param(50, marks=pytest.mark.long)])
def test_kills_while_ranks_write_lose_nothing(tmp_path: Path, num_kills: int) -> None:
    """Grids of two to four ranks resume each other, from the newest checkpoint that was reported, bit for bit.

    At last a rank whose disk is full ends all ranks with one error, and earlier checkpoints stay.
    """
    result = killed(tmp_path, num_kills, seed=num_kills)
    assert result["lost"] == []
    assert result["hits"] >= 0.8 * num_kills  # a save was in flight
    newest = int(str(result["newest"]))
    assert newest > 0
    errors = {rank: word for word, rank in result["errors"]}  # type: ignore[attr-defined]
    place = f"{tmp_path}/checkpoints/step-{newest + 1}"
    assert errors.pop(2).startswith(f"StorageError:cannot_write_{place}:_No_space_left_on_device;_free_space")
    assert errors == dict.fromkeys((0, 1, 3), "PeerFailed:another_process_of_the_run_ended")
    assert f"step-{newest}" in result["left"]  # type: ignore[operator]
    assert f"step-{newest + 1}" not in result["left"]  # type: ignore[operator]
