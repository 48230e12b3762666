"""Files of graded responses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mergeopd.storage.responses import EvaluatedResponse, read_responses, write_responses

ROW = EvaluatedResponse(
    domain="math",
    source="eval.jsonl",
    key="eval.jsonl:0",
    sample=0,
    prompt="2 + 2?\n",
    reference="4",
    response="fünf 🦊",
    reward=0.0,
    failure=None,
    finish="eos",
    num_tokens=3,
)


def test_rows_return_as_written(tmp_path: Path) -> None:
    path = tmp_path / "evaluation" / "merged.parquet"
    rows = [ROW, replace(ROW, sample=1, reference=None, reward=None, failure="timed out", finish="length")]
    write_responses(path, rows)
    assert read_responses(path) == rows
    write_responses(path, rows[:1])
    assert read_responses(path) == rows[:1]


def test_a_damaged_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "merged.parquet"
    write_responses(path, [ROW])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is damaged"):
        read_responses(path)
