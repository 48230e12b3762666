"""Disk errors: the message names the file, the exit code is 1, saved work is kept, and the run can be resumed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest

from mergeopd.storage.folders import verify

# Place where files are limited to a number of bytes, the file that cannot be written, and the newest checkpoint.
# While a checkpoint is written in the background, the run's other files may be the first to fail.
FULL = {
    "replace:1:FULL=0": ("", 0),  # after plan.yaml is written
    "text:1:FULL=100": (r"-texts/one-\w+.jsonl", 0),
    "files:1:FULL=20": (r"(checkpoints/step-2|metrics.jsonl)", 0),  # index.json
    "checkpoint:2:FULL=3000": (r"(checkpoints/step-4|metrics.jsonl)", 2),  # a message of safetensors
    "manifest:2:FULL=100": (r"(checkpoints/step-4|metrics.jsonl)", 2),
    "update:5:FULL=3000": (r"metrics.jsonl", 4),
    "checkpoint:3:FULL=3000": (r"checkpoints/step-6", 4),
    "evaluation:1:FULL=10": (r"evaluation-base", 6),
    "export:1:FULL=50": (r"export", 6),
}


@pytest.mark.parametrize("fault", FULL)
def test_a_full_disk(runs: Any, ends_well: Callable[..., str], fault: str) -> None:
    name = "full-" + fault.replace(":", "-").replace("=", "-")
    named, saved = FULL[fault]
    code, printed = runs(name, fault=fault)
    assert code == 1, printed
    [error] = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert re.search(rf"cannot write \S*{named}\S*: File too large; raise the file size limit", error), error
    folder = runs.folder(name)
    whole = sorted((folder / "checkpoints").glob("step-*"))
    assert [verify(path) for path in whole] == [None] * len(whole)
    assert max((int(path.name[5:]) for path in whole), default=0) == saved
    assert not (folder / "result.json").exists()
    ends_well(name)


def test_hidden_states_that_cannot_be_spilled(runs: Any, ends_well: Callable[..., str]) -> None:
    tiny = ("--set", "memory.hidden_states_gib=1e-12")
    code, printed = runs("full-spill", *tiny, fault="scoring:1:FULL=2000")
    assert code == 1, printed
    assert "error: cannot spill hidden states to" in printed
    assert "File too large" in printed
    ends_well("full-spill", *tiny)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_read_only_folder(runs: Any, ends_well: Callable[..., str]) -> None:
    assert runs("read-only", "--updates", "2")[0] == 3
    folder = runs.folder("read-only") / "checkpoints"
    folder.chmod(0o555)
    try:
        code, printed = runs("read-only")
    finally:
        folder.chmod(0o755)
    assert code == 1, printed
    assert "Permission denied" in printed
    ends_well("read-only")
