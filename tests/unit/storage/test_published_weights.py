"""Published versions are what servers load: whole folders of the current weights, or none."""

from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.errors import StorageError
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.recipe.training import Optimizer
from mergeopd.storage import published_weights
from mergeopd.storage.published_weights import PublishedWeights
from mergeopd.student.torch import TorchStudent

CPU = torch.device("cpu")
IDS = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published_weights, "_MAX_FILE_BYTES", 6_000)


def moved_student(folder: Path, dtype: str) -> TorchStudent:
    """A student whose weights are no longer those of its folder."""
    student = TorchStudent(folder, dtype=dtype, num_valid=33, optimizer=Optimizer(), device=CPU)
    generator = torch.Generator().manual_seed(3)
    for parameter in student.body.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return student


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_version_is_the_exported_student(
    make_model: Callable[..., Path], tmp_path: Path, tied: bool, dtype: str
) -> None:
    source = make_model("s", tied=tied)
    (source / "generation_config.json").write_text('{"eos_token_id": 2}')
    (source / "tokenizer.json").write_text("{}")
    student = moved_student(source, dtype)
    folder = PublishedWeights(tmp_path / "weights", source, SingleProcess()).publish(student, 7)
    assert folder == tmp_path / "weights" / "version-7"
    assert os.listdir(folder.parent) == ["version-7"]
    files = list(folder.glob("*.safetensors"))
    assert len(files) > 1
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {
        stat.S_IMODE((folder / "config.json").stat().st_mode)
    }
    assert all(len(load_file(file)) == 1 for file in files if file.stat().st_size > 6_500)
    student.export(tmp_path / "export")
    expected, actual = tensors_of(tmp_path / "export"), tensors_of(folder)
    assert actual.keys() == expected.keys()
    assert ("lm_head.weight" in actual) is not tied
    for name, tensor in actual.items():
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.equal(tensor, expected[name]), name
    assert Checkpoint.open(folder).num_weights == Checkpoint.open(tmp_path / "export").num_weights
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    for name in ("tokenizer.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    logits = [
        AutoModelForCausalLM.from_pretrained(path).eval()(IDS).logits
        for path in (folder, tmp_path / "export")
    ]
    assert logits[0].dtype == getattr(torch, dtype)
    assert torch.equal(*logits)


class Stream:
    """Ten tensors, and what happens before tensor `at`."""

    def __init__(self, value: float, at: int = 10, event: Callable[[], object] = int) -> None:
        self.value, self.at, self.event = value, at, event

    def folder_weights(self) -> Iterator[tuple[str, Tensor]]:
        for number in range(10):
            if number == self.at:
                self.event()
            yield f"tensor.{number}", torch.full((1000,), self.value)


def failing() -> None:
    raise OSError(28, "No space left on device")


def test_an_interrupted_version_does_not_exist(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Neither a failure nor a kill after the third file leaves a version; both are cleaned."""
    published = PublishedWeights(tmp_path, make_model("s"), SingleProcess())
    published.publish(Stream(1.0), 1)
    with pytest.raises(StorageError, match=r"cannot write .*version-2: No space left"):
        published.publish(Stream(2.0, 4, failing), 2)
    assert os.listdir(tmp_path) == ["version-1"]
    for version in (1, 2):  # 1 is published again, as by a resumed run
        process = os.fork()
        if process == 0:
            published.publish(Stream(3.0, 4, lambda: os.kill(os.getpid(), signal.SIGKILL)), version)
        assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
        written = list(tmp_path.glob(f".version-{version}.partial/*"))
        assert len(written) == 3
    assert sorted(os.listdir(tmp_path)) == [".version-1.partial", ".version-2.partial"]
    published.publish(Stream(4.0), 2)
    assert {float(t.max()) for t in tensors_of(tmp_path / "version-2").values()} == {4.0}
    published.prune(1)
    assert os.listdir(tmp_path) == ["version-2"]


def test_the_newest_versions_are_kept(make_model: Callable[..., Path], tmp_path: Path) -> None:
    published = PublishedWeights(tmp_path, make_model("s"), SingleProcess())
    for version in (8, 9, 10, 11):
        published.publish(Stream(float(version)), version)
    (tmp_path / "version-notes").mkdir()
    published.prune(2)
    assert sorted(os.listdir(tmp_path)) == ["version-10", "version-11", "version-notes"]
    assert {float(t.max()) for t in tensors_of(tmp_path / "version-10").values()} == {10.0}
