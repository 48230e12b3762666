"""Teachers are really loaded by turns: more of them need no more memory, and every byte read is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "bench_teachers.py"


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc (Linux)"
)
def test_eight_teachers_need_the_memory_of_two(tmp_path: Path) -> None:
    results = []
    for num_teachers in (8, 2):  # the larger one first: the smaller finds its teachers made
        finished = subprocess.run(
            [sys.executable, str(TOOL), "--teachers", str(num_teachers), "--folder", str(tmp_path), "--json"],
            check=True,
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        results.append(json.loads(finished.stdout))
    eight, two = results
    assert two["file_bytes"] > 2 * 180e6
    assert eight["file_bytes"] == 4 * two["file_bytes"]
    for result in results:
        assert result["bytes_read"] == result["file_bytes"] * result["num_rounds"]
    assert eight["peak_anonymous_bytes"] == pytest.approx(two["peak_anonymous_bytes"], rel=0.05)
    # One teacher alone would be 187 MB, were it in anonymous memory.
    assert eight["peak_anonymous_bytes"] - two["peak_anonymous_bytes"] < 20e6
