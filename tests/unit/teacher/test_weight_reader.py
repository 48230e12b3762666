"""Tensors that are read in parts are the files' bytes, whoever reads which part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.models.checkpoint import ELEMENT_TYPES, Checkpoint
from mergeopd.teacher.packing import Batch, stored_dtype
from mergeopd.teacher.weight_reader import MappedReader, ShardedReader

CPU = torch.device("cpu")


def test_every_element_type_that_a_checkpoint_may_have_is_known() -> None:
    assert all(isinstance(stored_dtype(name), torch.dtype) for name in ELEMENT_TYPES)


@pytest.mark.parametrize("batch_bytes", [1, 128, 300, 1 << 20])
def test_batches_of_every_size_give_the_mapped_tensors(tmp_path: Path, batch_bytes: int) -> None:
    torch.manual_seed(0)
    tensors = {
        "odd": torch.randn(3, 5).bfloat16(),
        "wide": torch.randn(7, 2, dtype=torch.float64),
        "scalar": torch.tensor(3.5),
        "nothing": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "half": torch.randn(9).half(),
        "long": torch.arange(5),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    opened = Checkpoint.open(tmp_path)
    names = list(tensors)
    found = dict(ShardedReader(SingleProcess(), batch_bytes).read(opened, names, CPU))
    mapped = dict(MappedReader().read(opened, names, CPU))
    assert found.keys() == mapped.keys() == tensors.keys()
    for name, expected in mapped.items():
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert MappedReader().num_bytes(opened, names) == size
    assert ShardedReader(SingleProcess(), batch_bytes).num_bytes(opened, names) == size


@given(st.lists(st.integers(0, 400), min_size=1, max_size=8), st.integers(1, 9))
def test_ranks_read_every_byte_once(sizes: list[int], world: int) -> None:
    """Against a plain numbering of the batch's bytes."""
    from types import SimpleNamespace

    tensors = {f"t{i}": SimpleNamespace(num_bytes=n) for i, n in enumerate(sizes)}
    starts, end = {}, 0
    for name, info in tensors.items():
        starts[name] = end
        end += -(-info.num_bytes // 64) * 64
    batch = Batch(starts, end)
    whole: list[tuple[str, int] | None] = []
    counts = []
    for rank in range(world):
        part: list[tuple[str, int] | None] = [None] * batch.part_bytes(world)
        pieces = list(batch.pieces(SimpleNamespace(tensors=tensors), rank, world))  # type: ignore[arg-type]
        for piece in pieces:
            for i in range(piece.num_bytes):
                assert part[piece.position + i] is None
                part[piece.position + i] = piece.name, piece.start + i
        counts.append(sum(piece.num_bytes for piece in pieces))
        whole += part
    assert sum(counts) == sum(sizes)
    assert max(counts) <= end / world + 64
    for name, info in tensors.items():
        span = whole[starts[name] : starts[name] + info.num_bytes]
        assert span == [(name, i) for i in range(info.num_bytes)]


def test_only_own_parts_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    class Second(SingleProcess):
        rank = 1
        size = 2

    save_file({"a": torch.zeros(64), "b": torch.zeros(64)}, tmp_path / "model.safetensors")
    opened = Checkpoint.open(tmp_path)
    asked = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, offset, length, what: asked.append((offset, length)), raising=False
    )
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    ShardedReader(Second()).read_ahead(opened, ["b", "a"])
    assert asked == [(opened.tensors["b"].offset, 256)]
    asked.clear()
    MappedReader().read_ahead(opened, ["b", "a"])
    assert asked == [(0, 0)]
