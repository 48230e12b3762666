"""Saves by several ranks, here as threads of one process, and reading of any box."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergeopd.errors import StorageError
from mergeopd.storage import parallel_save, state_parts
from mergeopd.storage.boxes import Box
from mergeopd.storage.folders import begin_folder, verify
from mergeopd.storage.parallel_save import ParallelSave, SaveFolder
from mergeopd.storage.state_parts import (
    INDEX,
    PartsFolder,
    StagedFile,
    StatePart,
    dealt_parts,
    save_of,
    staged,
)

LIMIT_S = 30.0


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embedding": (37, 48), "norm": (48,), "step": (), "experts": (3, 5, 7), "bias": (1,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def begun(target: Path, world: int, save: str = "s") -> list[ParallelSave]:
    folder = SaveFolder(target, begin_folder(target, f"-{save}"), save)
    return [ParallelSave(folder, rank, world, {"state.json": "{}"}, lambda: None) for rank in range(world)]


def files_of(parts: Sequence[StatePart]) -> Iterator[tuple[str, StagedFile]]:
    return (("student", file) for file in staged(parts))


def saved(target: Path, world: int, save: str = "s") -> dict[str, Tensor]:
    """Save `tensors`, the last rank first."""
    ranks, whole = begun(target, world, save), tensors()
    for saving in reversed(ranks):
        assert not target.exists()
        saving.start(files_of(list(dealt_parts(whole, saving.rank, world))))
        if saving.rank:
            saving.wait(LIMIT_S)
    ranks[0].wait(LIMIT_S)
    assert all(saving.is_done() for saving in ranks)
    return whole


def opened(folder: Path) -> PartsFolder:
    return PartsFolder.open_group(folder, json.loads((folder / INDEX).read_bytes()), "student")


@pytest.mark.parametrize(("world", "max_bytes"), [(1, 1 << 30), (2, 1 << 30), (4, 600), (8, 1 << 30)])
def test_any_box_of_a_save_is_read_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, max_bytes: int
) -> None:
    monkeypatch.setattr(state_parts, "_MAX_FILE_BYTES", max_bytes)
    target = tmp_path / "step-1"
    whole = saved(target, world)
    assert verify(target) is None
    files = {path.name: path.stat().st_size for path in target.glob("*.safetensors")}
    assert {name.split(".")[0].split("-")[1] for name in files} == {str(rank + 1) for rank in range(world)}
    assert {save_of(target / name) for name in files} == {"s"}
    folder = opened(target)
    assert folder.shapes == {name: tuple(tensor.shape) for name, tensor in whole.items()}
    assert all(torch.equal(folder.read(name), tensor) for name, tensor in whole.items())
    for name, start, shape in (
        ("embedding", (0, 3), (37, 2)),
        ("embedding", (17, 0), (11, 48)),
        ("experts", (1, 1, 2), (2, 3, 4)),
        ("norm", (47,), (1,)),
    ):
        box = Box(start, shape)
        expected = whole[name][box.within(Box.full(tuple(whole[name].shape)))]
        assert torch.equal(folder.read(name, box), expected)


def test_a_rank_that_cannot_write_ends_with_the_place_and_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, whole = tmp_path / "step-1", tensors()
    first, second = begun(target, 2)
    first.start(files_of(list(dealt_parts(whole, 0, 2))))

    def full(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    while not list(first.folder.temporary.glob("student-1*")):
        first.wait(0.01)
    monkeypatch.setattr(state_parts, "save_file", full)
    second.start(files_of(list(dealt_parts(whole, 1, 2))))
    second.wait(LIMIT_S)
    with pytest.raises(
        StorageError, match=rf"cannot write {target}: No space left .*student-2-of-2.*free space"
    ):
        second.is_done()
    assert list(first.folder.temporary.glob("student-2*")) == []
    assert not first.is_done()
    first.abandon()
    first.wait(LIMIT_S)
    assert not target.exists()


def test_files_that_the_first_rank_does_not_see_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel_save, "_VISIBLE_S", 0.0)
    first, *_ = begun(tmp_path / "step-1", 3)
    first.start(files_of(list(dealt_parts(tensors(), 0, 3))))
    first.peers_are_done()
    first.wait(LIMIT_S)
    with pytest.raises(
        StorageError, match=r"2 of 3 processes, process 2 among them.*file system that all machines"
    ):
        first.is_done()


def test_parts_that_do_not_make_up_a_tensor_are_a_mistake_of_the_program(tmp_path: Path) -> None:
    [saving] = begun(tmp_path / "step-1", 1)
    saving.start(files_of([StatePart("a", (4, 2), Box((0, 0), (3, 2)), torch.zeros(3, 2))]))
    saving.wait(LIMIT_S)
    with pytest.raises(RuntimeError, match="6 of the 8 elements of a"):
        saving.is_done()
