"""Teachers are loaded one after another: more teachers need no more memory, and every byte read is counted."""

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
def test_four_teachers_need_the_memory_of_two(tmp_path: Path) -> None:
    results = []
    for num_teachers in (4, 2):  # the larger one first, as the smaller one uses its teachers again
        # The same number for each teacher, so that micro-batches are full and of one size.
        options = ["--teachers", num_teachers, "--prompts", 10 * num_teachers, "--folder", tmp_path, "--json"]
        finished = subprocess.run(
            [sys.executable, str(TOOL), *map(str, options)],
            check=True,
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        results.append(json.loads(finished.stdout))
    four, two = results
    assert two["file_bytes"] > 2 * 180e6
    assert four["file_bytes"] == 2 * two["file_bytes"]
    for result in results:
        assert result["bytes_read"] == result["file_bytes"] * result["num_rounds"]
    # A teacher in anonymous memory would add 187 MB. Peaks of equal runs differ by up to 26 MB, since a thread
    # samples them.
    assert four["peak_anonymous_bytes"] - two["peak_anonymous_bytes"] < 60e6
