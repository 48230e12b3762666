"""Metrics survive kills: incomplete ends are removed, other lines keep their bytes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from mergeopd.errors import StorageError
from mergeopd.storage.metrics import MetricsFile, json_text


def write(path: Path, updates: range) -> None:
    with MetricsFile(path) as file:
        for update in updates:
            file.append({"update": update, "loss": 1 / (3 * update)})


def test_every_line_is_readable_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    file = MetricsFile(path)
    for update in (1, 2):
        file.append({"loss": 0.1 * update, "update": update})
        assert [json.loads(line)["update"] for line in path.read_text().splitlines()] == [
            *range(1, update + 1)
        ]
    assert path.read_text().startswith('{"update": 1, "loss": 0.1}\n')
    file.close()
    file.append({"update": 3})
    file.sync()
    file.close()
    assert len(path.read_text().splitlines()) == 3


def test_numbers_that_json_lacks_become_null_and_others_keep_their_bits() -> None:
    values = {
        "a": math.nan,
        "b": [math.inf, -math.inf, 1e-310],
        "c": {"d": 0.1 + 0.2, "e": (True, None, "NaN")},
    }
    text = json_text(values)
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "a": None, "b": [None, None, 1e-310], "c": {"d": 0.30000000000000004, "e": [True, None, "NaN"]},
    }  # fmt: skip


@pytest.mark.parametrize(
    "tail", ["", '{"update": 6, "lo', '{"update": 6, "loss": 1.0}', "\0" * 50, "\0\n\udcff"]
)
@pytest.mark.parametrize("update", [0, 3, 5, 9])
def test_truncation_drops_later_lines_and_a_torn_end(tmp_path: Path, tail: str, update: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 6))
    lines = path.read_bytes().splitlines(keepends=True)
    with path.open("ab") as file:
        file.write(tail.encode("utf-8", "surrogateescape"))
    assert MetricsFile(path).truncate_to(update) == min(5, update)
    assert path.read_bytes() == b"".join(lines[:update])
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_resumed_run_writes_the_lines_of_an_uninterrupted_one(tmp_path: Path) -> None:
    write(tmp_path / "straight.jsonl", range(1, 9))
    path = tmp_path / "disturbed.jsonl"
    write(path, range(1, 7))
    with path.open("a") as file:
        file.write('{"update": 7, "lo')
    file = MetricsFile(path)
    file.truncate_to(4)
    for update in range(5, 9):
        file.append({"update": update, "loss": 1 / (3 * update)})
    file.close()
    assert path.read_bytes() == (tmp_path / "straight.jsonl").read_bytes()


def test_truncation_of_an_open_file_and_of_none(tmp_path: Path) -> None:
    assert MetricsFile(tmp_path / "none.jsonl").truncate_to(4) == 0
    assert list(tmp_path.iterdir()) == []
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        for update in (1, 2, 3):
            file.append({"update": update})
        assert file.truncate_to(1) == 1
        file.append({"update": 2, "again": True})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"update": 1}\n{"update": 2, "again": true}\n'


@pytest.mark.parametrize(
    ("line", "fault"),
    [("garbage", "is damaged"), ("[1]", "is damaged"), ('{"update": 99}', "belongs to update 99")],
)
def test_damage_before_the_cut_is_reported(tmp_path: Path, line: str, fault: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 5))
    lines = path.read_text().splitlines()
    lines[1] = line
    path.write_text("\n".join(lines) + "\n")
    before = path.read_bytes()
    with pytest.raises(StorageError, match=rf"cannot resume with .*metrics.jsonl: line 2 {fault}"):
        MetricsFile(path).truncate_to(4)
    assert path.read_bytes() == before
    if fault == "is damaged":
        MetricsFile(path).truncate_to(1)  # a cut before it heals the file
        assert path.read_text().splitlines() == lines[:1]


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write .*: Is a directory; a folder is where a file"):
        MetricsFile(tmp_path).append({"update": 1})
    with pytest.raises(StorageError, match=r"cannot read .*: Is a directory"):
        MetricsFile(tmp_path).truncate_to(1)


def test_a_record_needs_its_update(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        MetricsFile(tmp_path / "metrics.jsonl").append({"loss": 1.0})
