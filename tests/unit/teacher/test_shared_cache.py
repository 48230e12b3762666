"""The cache of several processes, on one: bits, budget, spill, and that nothing outlives the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.errors import StorageError
from mergeopd.teacher import shared_cache as node_cache
from mergeopd.teacher.hidden_cache import HiddenCache, SpillSlot
from mergeopd.teacher.shared_cache import SharedHiddenCache

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's")

GENEROUS = 1 << 30


def alone(budget_bytes: int, folder: Path) -> SharedHiddenCache:
    return SharedHiddenCache(budget_bytes, folder, SingleProcess(), lambda rollout: {0}, torch.device("cpu"))


def some_states(dtype: torch.dtype) -> dict[tuple[str, int], Tensor]:
    torch.manual_seed(0)
    return {("ab"[i % 2], i // 2): torch.randn(i % 5 + 1, 7).to(dtype) for i in range(20)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("budget_bytes", [0, 500, GENEROUS])
def test_it_is_the_cache_of_one_process_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, budget_bytes: int
) -> None:
    states = some_states(dtype)

    def told(cache: HiddenCache) -> tuple[list[Tensor], tuple[int, int]]:
        gathered = []
        for turn in (list(states)[:11], list(states)[11:]):
            for key in turn:
                cache.put(*key, states[key])
            cache.publish()
            gathered.append(cache.gather("a", [2, 0, 2]))
        gathered += [cache.gather(teacher, [7, 0, 9, 3]) for teacher in "ab"]
        return gathered, (cache.num_bytes, cache.num_spilled_bytes)

    with HiddenCache(budget_bytes, tmp_path / "one", torch.device("cpu")) as cache:
        expected, counted = told(cache)
    with alone(budget_bytes, tmp_path / "several") as cache:
        found, found_counted = told(cache)
    assert found_counted == counted
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert list(tmp_path.rglob("*.*")) == []
    assert (tmp_path / "several").exists() == bool(counted[1])


def test_teachers_of_different_width_and_precision_share_the_files(tmp_path: Path) -> None:
    odd = torch.randn(3, 5).bfloat16()
    wide = torch.randn(2, 4, dtype=torch.float64)
    with alone(GENEROUS, tmp_path) as cache:
        cache.put("odd", 0, odd)
        cache.put("wide", 0, wide)
        cache.put("wide", 1, wide[:0])
        cache.publish()
        assert torch.equal(cache.gather("odd", [0]), odd)
        assert torch.equal(cache.gather("wide", [1, 0, 1]), wide)


def test_duplicate_and_unknown_rollouts_are_errors(tmp_path: Path) -> None:
    with alone(GENEROUS, tmp_path) as cache:
        cache.put("t", 1, torch.ones(2, 3))
        with pytest.raises(KeyError, match="no hidden states of teacher 't' for rollout 1"):
            cache.gather("t", [1])  # not published
        for _ in range(2):
            with pytest.raises(KeyError, match="teacher 't' has already scored rollout 1"):
                cache.put("t", 1, torch.ones(2, 3))
            cache.publish()
        with pytest.raises(KeyError, match="no hidden states of teacher 'other' for rollout 1"):
            cache.gather("other", [1])


def test_a_disk_error_is_reported(tmp_path: Path) -> None:
    (tmp_path / "spill").write_text("a file where the folder should be")
    with alone(0, tmp_path / "spill") as cache, pytest.raises(StorageError, match="cannot spill"):
        cache.put("t", 0, torch.ones(1, 1))


def test_a_memory_error_is_reported_and_keeps_earlier_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with alone(GENEROUS, tmp_path) as cache:
        cache.put("t", 0, torch.ones(1, 3))
        pwrite, calls = os.pwrite, []

        def torn(descriptor: int, data: memoryview, offset: int) -> int:
            calls.append(offset)
            if len(calls) == 2:
                raise OSError(12, "Cannot allocate memory")
            return pwrite(descriptor, data[:5], offset)

        monkeypatch.setattr(os, "pwrite", torn)
        with pytest.raises(
            StorageError, match=r"12 more bytes .* in memory besides 12: Cannot .*hidden_states_gib"
        ):
            cache.put("t", 1, torch.full((1, 3), 2.0))
        assert calls == [12, 17]
        monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:5], offset))
        cache.put("t", 1, torch.full((1, 3), 3.0))
        cache.publish()
        assert cache.gather("t", [0, 1]).tolist() == [[1.0] * 3, [3.0] * 3]


def test_a_file_that_others_cannot_open_or_that_was_cut_is_named(tmp_path: Path) -> None:
    with alone(GENEROUS, tmp_path) as cache:
        cache.put("t", 0, torch.ones(1, 3))
        key, place = next(iter(cache._fresh.items()))
        cache._fresh[key] = replace(place, file="/proc/0/fd/0")
        with pytest.raises(StorageError, match=r"cannot open /proc/0/fd/0, .* to one user"):
            cache.publish()
        cache._slots[key] = replace(place, offset=4)
        with pytest.raises(StorageError, match="end 4 bytes early"):
            cache.gather("t", [0])


def test_messages_to_another_machine_are_split_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_cache, "_PARCEL_BYTES", 40)
    slots = [SpillSlot("f", 0, (rows, 4), torch.bfloat16) for rows in (1, 2, 3, 9, 1, 4)]
    batches = list(node_cache._batches([(("t", i), p) for i, p in enumerate(slots)]))
    assert [[key[1] for key, _ in batch] for batch in batches] == [[0, 1], [2], [3], [4, 5]]
    assert list(node_cache._batches([])) == []


VICTIM = """
import os, sys, torch
from pathlib import Path
from mergeopd.distributed.communicator import SingleProcess
from mergeopd.teacher.shared_cache import SharedHiddenCache
cache = SharedHiddenCache(400, Path(sys.argv[1]), SingleProcess(), lambda rollout: {0}, torch.device("cpu"))
for rollout in range(8):
    cache.put("t", rollout, torch.full((1, 25), float(rollout)))
cache.publish()
print(cache.num_bytes, cache.num_spilled_bytes, *{p.file for p in cache._slots.values()}, flush=True)
sys.stdin.read()
"""


def test_nothing_outlives_a_process_that_is_killed(tmp_path: Path) -> None:
    victim = subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(tmp_path / "spill")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert victim.stdout is not None
        in_memory, on_disk, *files = victim.stdout.readline().split()
        assert (in_memory, on_disk) == ("400", "400")
        # Both can be opened by another process of this machine, and neither has a name.
        sizes = [os.stat(file).st_size for file in files]
        assert sizes == [400, 400]
        assert [os.stat(file).st_nlink for file in files] == [0, 0]
        assert list((tmp_path / "spill").iterdir()) == []
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.communicate(timeout=30)
    assert victim.returncode == -signal.SIGKILL
    assert not any(os.path.lexists(file) for file in files)
    assert list((tmp_path / "spill").iterdir()) == []
