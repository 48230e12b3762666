"""Checkpoint against safetensors' own writer and reader, and on damaged folders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mergeopd.errors import ModelError
from mergeopd.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    import torch

    torch.manual_seed(0)
    return {
        "a": torch.randn(300, 64),
        "b": torch.randn(7, 5, 3).bfloat16(),
        "c": torch.arange(10),
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
    }


@pytest.fixture
def single(tmp_path: Path, tensors: dict[str, Any]) -> Path:
    from safetensors.torch import save_file

    folder = tmp_path / "single"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def sharded(tmp_path: Path, tensors: dict[str, Any]) -> Path:
    from safetensors.torch import save_file

    folder = tmp_path / "sharded"
    folder.mkdir()
    parts = {
        "model-1-of-2.safetensors": ["a", "empty"],
        "model-2-of-2.safetensors": ["b", "c", "scalar", "flags"],
    }
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in parts.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_headers_and_tensors(layout: str, tensors: dict[str, Any], request: pytest.FixtureRequest) -> None:
    import torch

    folder: Path = request.getfixturevalue(layout)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, expected in tensors.items():
        info = checkpoint.tensors[name]
        assert (info.shape, info.num_bytes) == (tuple(expected.shape), expected.nbytes)
        with info.file.open("rb") as file:
            file.seek(info.offset)
            assert (
                file.read(info.num_bytes)
                == expected.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
        found = checkpoint.read(name)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    assert torch.equal(checkpoint.read_slice("a", 17, 40), tensors["a"][17:40])
    assert torch.equal(checkpoint.read_slice("b", 0, 7), tensors["b"])
    columns = tensors["a"].shape[1]
    assert torch.equal(checkpoint.read_slice("a", 1, columns - 1, dim=1), tensors["a"][:, 1:-1])
    assert torch.equal(checkpoint.read_slice("a", columns, columns, dim=1), tensors["a"][:, :0])
    assert checkpoint.file_bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert checkpoint.file_bytes == checkpoint.header_bytes + sum(
        t.num_bytes for t in checkpoint.tensors.values()
    )


def test_same_bytes(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    a = torch.randn(700, 1000)
    b, last = a.clone(), a.clone()
    last[-1, -1] += 1
    save_file(
        {"a": a, "b": b, "last": last, "shape": a.reshape(1000, 700).clone()}, tmp_path / "model.safetensors"
    )
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.same_bytes("a", "b")
    assert not checkpoint.same_bytes("a", "last")
    assert not checkpoint.same_bytes("a", "shape")


def test_unknown_tensors_and_rows(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    with pytest.raises(ModelError, match="no tensor 'nope'"):
        checkpoint.read("nope")
    for rows in ((-1, 2), (0, 301), (5, 4)):
        with pytest.raises(ModelError, match=f"has no rows {rows[0]} to {rows[1]}"):
            checkpoint.read_slice("a", *rows)
    for name, columns in (("a", (-1, 2)), ("a", (0, 99)), ("a", (2, 1)), ("b", (0, 99))):
        with pytest.raises(ModelError, match=f"has no columns {columns[0]} to {columns[1]}"):
            checkpoint.read_slice(name, *columns, dim=1)


def test_any_span_of_bytes_is_read_into_a_buffer(single: Path, tensors: dict[str, Any]) -> None:
    import torch

    checkpoint = Checkpoint.open(single)
    for name, start, stop in (("a", 0, 76800), ("a", 5, 1003), ("b", 209, 210), ("empty", 0, 0)):
        buffer = bytearray(stop - start)
        checkpoint.read_into(name, start, memoryview(buffer))
        whole = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert bytes(buffer) == whole[start:stop]
    for name, start, length in (("a", -1, 4), ("a", 76799, 2), ("empty", 0, 1)):
        with pytest.raises(ModelError, match=f"has no bytes {start} to {start + length}"):
            checkpoint.read_into(name, start, memoryview(bytearray(length)))
    with pytest.raises(ModelError, match="no tensor 'absent'"):
        checkpoint.read_into("absent", 0, memoryview(bytearray(1)))
    info = checkpoint.tensors["a"]
    with info.file.open("r+b") as file:
        file.truncate(info.offset + 10)
    with pytest.raises(ModelError, match="was truncated while 'a' was read; fetch it again"):
        checkpoint.read_into("a", 0, memoryview(bytearray(20)))
    info.file.unlink()
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        checkpoint.read_into("a", 0, memoryview(bytearray(20)))


def test_a_single_file_goes_before_an_index(single: Path) -> None:
    (single / "model.safetensors.index.json").write_text("{")
    assert "a" in Checkpoint.open(single).tensors


def test_reading_copies_nothing(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(16 << 20)}, tmp_path / "model.safetensors")
    code = """
import sys
from pathlib import Path
import torch
from mergeopd.models.checkpoint import Checkpoint

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

checkpoint = Checkpoint.open(Path(sys.argv[1]))
checkpoint.read_slice("w", 0, 1)
before = anonymous()
tensor = checkpoint.read("w")
tensor.sum()
print(anonymous() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("anonymous memory is told by Linux's /proc only")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 8 << 10  # KiB; the tensor has 64 MiB


# ------------------------------------------------------------------------------------------ fingerprint


def test_fingerprint_is_stable_over_copying(sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text("{}")
    assert Checkpoint.open(sharded).fingerprint == Checkpoint.open(tmp_path / "copy").fingerprint


@pytest.mark.parametrize("change", ["first value", "one tensor", "name", "dtype"])
def test_fingerprint_sees_changes(single: Path, tensors: dict[str, Any], change: str) -> None:
    import torch
    from safetensors.torch import save_file

    before = Checkpoint.open(single).fingerprint
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    if change == "first value":
        changed["a"][0, 0] += 1
    elif change == "one tensor":
        changed["b"] += 1
    elif change == "name":
        changed["d"] = changed.pop("c")
    else:
        changed["c"] = changed["c"].view(torch.float64)
    save_file(changed, single / "model.safetensors", metadata={"format": "pt"})
    assert Checkpoint.open(single).fingerprint != before


def test_fingerprint_sees_one_changed_layer_among_large_ones(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    layers = {f"layer{i:02}": torch.zeros(100_000) for i in range(40)}
    save_file(layers, tmp_path / "model.safetensors")
    prints = {Checkpoint.open(tmp_path).fingerprint}
    for name in layers:
        save_file(layers | {name: torch.ones(100_000)}, tmp_path / "model.safetensors")
        prints.add(Checkpoint.open(tmp_path).fingerprint)
    assert len(prints) == 41


# --------------------------------------------------------------------------------------------- bad input


def message_of(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        Checkpoint.open(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no weights (model.safetensors or model.safetensors.index.json)"),
        (["pytorch_model.bin"], "pickled weights are refused"),
        (["adapter_model.safetensors"], "holds a PEFT adapter"),
        (["consolidated.safetensors"], "has 'consolidated.safetensors' but neither"),
    ],
)
def test_no_weights(tmp_path: Path, files: list[str], message: str) -> None:
    for file in files:
        (tmp_path / file).write_bytes(b"")
    assert message in message_of(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    assert "there is no such folder" in message_of(tmp_path / "nothing")


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-2-of-2.safetensors").unlink()
    assert "1 of 2 weight files are missing: 'model-2-of-2.safetensors'" in message_of(sharded)


def edit_index(folder: Path, **weight_map: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= weight_map
    path.write_text(json.dumps(index))


def test_index_names_absent_tensors(sharded: Path) -> None:
    edit_index(sharded, ghost="model-1-of-2.safetensors", b="model-1-of-2.safetensors")
    assert "assigns to this file are missing: 'b', 'ghost'" in message_of(sharded)


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/passwd", "weights.bin", 3])
def test_index_points_elsewhere(sharded: Path, file: Any) -> None:
    edit_index(sharded, a=file)
    assert "which is not a .safetensors file of the same folder" in message_of(sharded)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), ("[]", "must hold a JSON object"), ('{"weight_map": {}}', "no weight_map")],
)
def test_damaged_index(sharded: Path, content: str, message: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    assert message in message_of(sharded)


@pytest.mark.parametrize("cut", [3, 20, -5000, -1])
def test_truncated_file(single: Path, cut: int) -> None:
    path = single / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:cut])
    message = message_of(single)
    assert "fetch it again" in message
    assert "truncated, damaged or not a safetensors file" in message


def test_longer_file_and_git_lfs_pointer(single: Path) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    assert "file not fully covered; fetch it again" in message_of(single)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "it is a Git LFS pointer" in message_of(single)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        b"[" * 100_000,
    ],
)
def test_damaged_header(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    message = message_of(tmp_path)
    assert "truncated, damaged or not a safetensors file" in message


def test_element_types_that_torch_cannot_hold_are_refused(tmp_path: Path) -> None:
    header = b'{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(1))
    assert "'F4' is not supported; save the weights as BF16" in message_of(tmp_path)
