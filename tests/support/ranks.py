"""Several processes of one worker script, under a hard limit of time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest


def run_ranks(worker: Path, world: int, folder: Path, *arguments: str, deadline_s: float) -> list[Path]:
    """Run `worker RANK WORLD STORE OUT *arguments` for every rank, one thread each; the ranks' `OUT` files.

    A rank that hangs or dies fails the test with its output; none survives.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    outputs = [folder / f"rank{rank}.out" for rank in range(world)]
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    ranks = []
    for rank, (out, log) in enumerate(zip(outputs, logs, strict=True)):
        command = [sys.executable, str(worker), str(rank), str(world), str(folder / "store"), str(out)]
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [*command, *arguments], stdout=sink, stderr=subprocess.STDOUT, env=environment
            )
        ranks.append(process)
    deadline = time.monotonic() + deadline_s
    try:
        for process in ranks:
            process.wait(timeout=max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        said = "\n".join(log.read_text()[-2000:] for log in logs)
        pytest.fail(f"no result after {deadline_s} s:\n{said}")
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    failed = [log.read_text()[-2000:] for log, process in zip(logs, ranks, strict=True) if process.returncode]
    assert not failed, "\n".join(failed)
    return outputs
