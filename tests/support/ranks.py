"""Run several processes of one worker script with a time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

# Looks for Megatron without importing it, which takes seconds.
needs_megatron = pytest.mark.skipif(
    find_spec("megatron") is None, reason="the extra mergeopd[megatron] is not installed"
)
LAUNCHER = Path(__file__).with_name("fork_ranks.py")


def run_ranks(worker: Path, world: int, folder: Path, *arguments: str, deadline_s: float) -> list[Path]:
    """Run `worker RANK WORLD STORE OUT *arguments` for every rank, one thread each; the ranks' `OUT` files.

    A rank that hangs or dies fails the test with its output; none survives.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(LAUNCHER), str(worker), str(world), str(folder), *arguments]
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    with (folder / "launcher.log").open("wb") as sink:
        launcher = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        code = launcher.wait(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        pytest.fail(f"no result after {deadline_s} s:\n{_ends(folder, logs)}")
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
    assert code == 0, _ends(folder, logs)
    return [folder / f"rank{rank}.out" for rank in range(world)]


def _ends(folder: Path, logs: list[Path]) -> str:
    """The last lines that the launcher and its ranks wrote."""
    written = [log for log in (folder / "launcher.log", *logs) if log.exists()]
    return "\n".join(log.read_text(errors="replace")[-2000:] for log in written)
