"""The cache of hidden states: what does not fit in memory comes back from disk bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergeopd.errors import StorageError
from mergeopd.teacher.hidden_cache import HiddenCache

GENEROUS = 1 << 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("budget_bytes", [0, 500, GENEROUS])
def test_every_budget_gives_the_same_bits(tmp_path: Path, dtype: torch.dtype, budget_bytes: int) -> None:
    torch.manual_seed(0)
    states = {("ab"[i % 2], i // 2): torch.randn(i % 5 + 1, 7).to(dtype) for i in range(20)}
    with HiddenCache(budget_bytes, tmp_path / "spill", torch.device("cpu")) as cache:
        for (teacher, rollout), hidden in list(states.items())[:12]:
            cache.put(teacher, rollout, hidden)
        early = cache.gather("a", [0, 2])
        for (teacher, rollout), hidden in list(states.items())[12:]:
            cache.put(teacher, rollout, hidden)
        assert cache.num_bytes <= budget_bytes
        total = sum(h.numel() * h.element_size() for h in states.values())
        assert cache.num_bytes + cache.num_spilled_bytes == total
        assert torch.equal(early, torch.cat([states["a", 0], states["a", 2]]))
        for teacher in "ab":
            order = [7, 0, 9, 3]
            expected = torch.cat([states[teacher, i] for i in order])
            found = cache.gather(teacher, order)
            assert torch.equal(found, expected)
            assert found.dtype == dtype
    assert torch.equal(found, expected)  # what was gathered outlives the file
    assert list(tmp_path.rglob("*.bin")) == []


@pytest.mark.parametrize("budget_bytes", [0, GENEROUS])
def test_hidden_states_come_back_on_the_device_of_the_updates(tmp_path: Path, budget_bytes: int) -> None:
    """Kept in main memory, whatever device computed them: a round's do not fit beside the student."""
    with HiddenCache(budget_bytes, tmp_path, torch.device("meta")) as cache:
        cache.put("t", 1, torch.ones(2, 3))
        assert cache.gather("t", [1, 1]).device.type == "meta"
        with pytest.raises(NotImplementedError, match="meta tensor"):  # nothing is held there
            cache.put("t", 2, torch.ones(2, 3, device="meta"))


def test_memory_alone_makes_no_file(tmp_path: Path) -> None:
    with HiddenCache(GENEROUS, tmp_path / "spill", torch.device("cpu")) as cache:
        cache.put("t", 1, torch.ones(2, 3))
        assert cache.gather("t", [1]).tolist() == [[1.0] * 3] * 2
    assert not (tmp_path / "spill").exists()


def test_duplicate_and_unknown_rollouts_are_errors(tmp_path: Path) -> None:
    for budget_bytes in (0, GENEROUS):
        with HiddenCache(budget_bytes, tmp_path, torch.device("cpu")) as cache:
            cache.put("t", 1, torch.ones(2, 3))
            with pytest.raises(KeyError, match="already"):
                cache.put("t", 1, torch.ones(2, 3))
            with pytest.raises(KeyError):
                cache.gather("other", [1])


def test_a_disk_error_is_reported(tmp_path: Path) -> None:
    (tmp_path / "spill").write_text("a file where the folder should be")
    with (
        HiddenCache(0, tmp_path / "spill", torch.device("cpu")) as cache,
        pytest.raises(StorageError, match="cannot spill"),
    ):
        cache.put("t", 0, torch.ones(1, 1))
