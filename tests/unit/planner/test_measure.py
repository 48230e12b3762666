"""A measured profile, from few and small measurements, and what is read back from its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mergeopd
from mergeopd.planner import measure as measuring
from mergeopd.planner.measure import Bench, measure
from mergeopd.planner.profile import measured_file, read_hardware, write_profile


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_SIDES_CPU", (1, 64, 256))
    monkeypatch.setattr(measuring, "_WEIGHTS_BYTES", 8 << 20)
    monkeypatch.setattr(measuring, "_HEAD_ROWS", 512)
    for name in ("_DISK_BYTES", "_COPIED"):
        monkeypatch.setattr(measuring, name, 1 << 20)
    monkeypatch.setattr(measuring, "_TRAINED", 1 << 12)
    monkeypatch.setattr(measuring, "_HIDDEN", (64, 128))
    monkeypatch.setattr(measuring, "_REPEATS", 1)
    started = [{"bytes": 4e8, "message_s": 1e-4, "bandwidth": 2e9}] * 2
    monkeypatch.setattr(measuring, "_started", lambda number: started)
    monkeypatch.setattr(measuring.torch.cuda, "is_available", lambda: False)


def test_profile_of_this_machine(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_recipe: Callable[..., Path]
) -> None:
    stages: list[str] = []
    profile = measure(stages.append, tmp_path)
    table = profile.rates["float32"].table
    # One row is bound by reading the weights, many by the products.
    assert table[-1][1] > table[0][1]
    assert profile.rate("float32", 1024) == pytest.approx(table[-1][1])
    assert table[0][1] < profile.rate("float32", 8) < table[-1][1]
    # No machine reads and writes less than 100 MB or more than 10 TB a second.
    assert 1e8 < profile.memory_bandwidth < 1e13
    assert "disk" in stages
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured_file().parent.mkdir()
    write_profile(profile, measured_file())
    again = read_hardware(None)
    assert again.profile == profile
    result = mergeopd.plan(write_recipe(student={"model": "student"}), response_tokens=10)
    assert result.device == profile.title
    assert result.seconds > 0


def test_fastest_repeat_counts() -> None:
    """Ten times the work takes several times as long."""
    bench, a = Bench(torch.device("cpu")), torch.randn(256, 256)
    alone = bench.seconds(lambda: [a @ a for _ in range(4)])
    twice = bench.seconds(lambda: [a @ a for _ in range(40)])
    assert twice > 3 * alone
