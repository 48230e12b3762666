"""Safetensors checkpoints: headers read without torch; tensors memory-mapped, one at a time.

Format: 8 bytes little-endian header length, a JSON header, the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format). Pickled weights are never opened.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from mergeopd.errors import ModelError
from mergeopd.models.json_file import read_object

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_EDGE_BYTES = 65536
_NUM_BLOCKS = 16
_TENSOR_SAMPLE_BYTES = 4096

ELEMENT_TYPES = (
    *("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "U16", "I16", "F16", "BF16"),
    *("U32", "I32", "F32", "U64", "I64", "F64"),
)
FLOATS = frozenset(("BF16", "F16", "F32", "F64"))


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Location of a tensor: `offset` and `num_bytes` count bytes in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Shard:
    """One file: its size and that of its length field and header, in bytes."""

    path: Path
    size: int
    header_bytes: int
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


class Checkpoint:
    """The weights of a Hugging Face folder. Opening reads headers only.

    `header_bytes` is the part of `file_bytes` that is not tensor data, over all files; `metadata` the text
    that headers have beside the tensors.
    """

    def __init__(self, folder: Path, shards: tuple[_Shard, ...], tensors: Mapping[str, TensorInfo]) -> None:
        self.folder = folder
        self.metadata = {key: value for shard in shards for key, value in shard.metadata.items()}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(tensors))
        self.file_bytes = sum(shard.size for shard in shards)
        self.header_bytes = sum(shard.header_bytes for shard in shards)
        self._shards = shards

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read and check all headers of `folder`.

        A single model.safetensors takes precedence over an index, as in transformers. Raises ModelError when
        there are no safetensors, a shard or a tensor is missing, or a file is truncated or damaged.
        """
        if (folder / SINGLE).is_file():
            shard = _read_shard(folder / SINGLE)
            return cls(folder, (shard,), shard.tensors)
        if not (folder / INDEX).is_file():
            raise ModelError(_no_weights(folder))
        weight_map = _read_index(folder / INDEX)
        files = sorted(set(weight_map.values()))
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{folder}: {len(missing)} of {len(files)} weight files are missing: {_listed(missing)}; "
                f"fetch them again ({INDEX} names them)"
            )
        shards = {name: _read_shard(folder / name) for name in files}
        absent = [name for name, file in weight_map.items() if name not in shards[file].tensors]
        if absent:
            raise ModelError(
                f"{folder / weight_map[absent[0]]}: tensors that {INDEX} assigns to this file are missing: "
                f"{_listed(absent)}; the index and the files are not of one checkpoint, fetch both again"
            )
        tensors = {name: shards[file].tensors[name] for name, file in weight_map.items()}
        return cls(folder, tuple(shards.values()), tensors)

    @property
    def num_weights(self) -> int:
        """Number of elements of all tensors."""
        return sum(prod(info.shape) for info in self.tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of headers and samples of the data; equal for copies of the files.

        It covers every header, every file's size and samples of the data: the first and last 64 KiB and 16
        evenly spaced blocks of 64 KiB of each file, and 4 KiB in the middle of every tensor, so that a
        fine-tune of a single layer is detected. A change elsewhere in a tensor is not.
        """
        digest = hashlib.sha256()
        for shard in self._shards:
            layout = [
                [name, t.dtype, list(t.shape), t.offset - shard.header_bytes, t.num_bytes]
                for name, t in sorted(shard.tensors.items())
            ]
            digest.update(json.dumps([shard.size, layout]).encode())
            data_bytes = shard.size - shard.header_bytes
            spots = [(0, _EDGE_BYTES), (max(0, data_bytes - _EDGE_BYTES), _EDGE_BYTES)]
            spots += [(data_bytes * i // _NUM_BLOCKS, _EDGE_BYTES) for i in range(_NUM_BLOCKS)]
            for info in shard.tensors.values():
                length = min(info.num_bytes, _TENSOR_SAMPLE_BYTES)
                spots.append((info.offset - shard.header_bytes + (info.num_bytes - length) // 2, length))
            with shard.path.open("rb") as file:
                for start, length in sorted(spots):
                    file.seek(shard.header_bytes + start)
                    digest.update(file.read(length))
        return digest.hexdigest()

    def read(self, name: str) -> Tensor:
        """Return the tensor `name`, `[*shape]` in the file's dtype: a view of the mapped file, no copy.

        Raises ModelError when there is no such tensor.
        """
        [(_, tensor)] = self.read_all([name])
        return tensor

    def read_all(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors as `read` returns them, file by file; each file is opened once."""
        from safetensors import safe_open

        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._find(name).file, []).append(name)
        for path, own in by_file.items():
            with safe_open(path, framework="pt") as file:
                for name in own:
                    yield name, file.get_tensor(name)

    def read_slice(self, name: str, start: int, stop: int, dim: int = 0) -> Tensor:
        """Return rows (`dim` 0) or columns (1) `start` to `stop` (excluded) of the tensor `name`.

        Raises ModelError when there is no such tensor, row or column.
        """
        from safetensors import safe_open

        info = self._find(name)
        if len(info.shape) <= dim or not 0 <= start <= stop <= info.shape[dim]:
            raise ModelError(
                f"{info.file}: {name!r} of shape {list(info.shape)} has no "
                f"{'columns' if dim else 'rows'} {start} to {stop}"
            )
        with safe_open(info.file, framework="pt") as file:
            part: Tensor = file.get_slice(name)[(slice(None),) * dim + (slice(start, stop),)]
        return part

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with bytes of the tensor `name`, from its byte `start` on.

        Raises ModelError when there is no such tensor or byte, or the file cannot be read.
        """
        self.read_parts(name, [(start, buffer)])

    def read_parts(self, name: str, parts: Iterable[tuple[int, memoryview]]) -> None:
        """Fill several buffers with bytes of one tensor; see `read_into`."""
        info = self._find(name)
        try:
            with info.file.open("rb", buffering=0) as file:
                for start, buffer in parts:
                    stop = start + len(buffer)
                    if not 0 <= start <= stop <= info.num_bytes:
                        raise ModelError(
                            f"{info.file}: {name!r} of {info.num_bytes} bytes has no bytes {start} to {stop}"
                        )
                    file.seek(info.offset + start)
                    done = 0
                    while done < len(buffer):
                        count = file.readinto(buffer[done:])
                        if not count:
                            raise ModelError(
                                f"{info.file}: was truncated while {name!r} was read; fetch it again"
                            )
                        done += count
        except OSError as error:
            raise ModelError(f"{info.file}: cannot be read: {error.strerror}") from error

    def read_integers(self, name: str) -> tuple[int, ...]:
        """Return the numbers of a small tensor of 64-bit integers. Raises ModelError, see `read_into`."""
        info = self._find(name)
        if info.dtype != "I64":
            raise ModelError(f"{info.file}: {name!r} has elements of type {info.dtype}, not I64")
        data = bytearray(info.num_bytes)
        self.read_into(name, 0, memoryview(data))
        return struct.unpack(f"<{info.num_bytes // 8}q", data)

    def same_bytes(self, first: str, second: str) -> bool:
        """Whether two tensors are bitwise equal, such as a tied head that was saved twice.

        Raises ModelError when one of them does not exist.
        """
        a, b = self._find(first), self._find(second)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        with a.file.open("rb") as file_a, b.file.open("rb") as file_b:
            file_a.seek(a.offset)
            file_b.seek(b.offset)
            for done in range(0, a.num_bytes, 1 << 20):
                length = min(1 << 20, a.num_bytes - done)
                if file_a.read(length) != file_b.read(length):
                    return False
        return True

    def _find(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise ModelError(f"{self.folder}: the checkpoint has no tensor {name!r}")
        return self.tensors[name]


def _listed(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more


def _no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: there is no such folder; name a Hugging Face model folder"
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if "adapter_model.safetensors" in others:
        return (
            f"{folder}: holds a PEFT adapter, not a model; merge it into its base model "
            "(merge_and_unload, then save_pretrained)"
        )
    if others:
        return (
            f"{folder}: has {_listed(others)} but neither {SINGLE} nor {INDEX}; "
            "load it with transformers and save_pretrained it"
        )
    if pickles:
        return (
            f"{folder}: has {_listed(pickles)} but no safetensors; pickled weights are refused, since "
            "reading them can run code. Convert them where you trust them: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    return f"{folder}: has no weights ({SINGLE} or {INDEX}); fetch the model again"


def _read_index(path: Path) -> dict[str, str]:
    weight_map = (read_object(path, ModelError) or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path}: has no weight_map; fetch the file again")
    for name, file in weight_map.items():
        # A name that contains a folder could refer to any place on the disk.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(
                f"{path}: tensor {name!r} is in {file!r}, which is not a .safetensors file of the same folder"
            )
    return weight_map


def _read_shard(path: Path) -> _Shard:
    """Read a header, after the library's check that it is valid and that its tensors fill the file."""
    from safetensors import SafetensorError, safe_open

    size, prefix = 0, b""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            with safe_open(path, framework="numpy"):
                header = json.loads(file.read(int.from_bytes(prefix, "little")))
            start = file.tell()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (SafetensorError, ValueError) as error:
        reason = "it is a Git LFS pointer" if prefix == b"version " else str(error).rpartition("header: ")[2]
        raise ModelError(
            f"{path}: truncated, damaged or not a safetensors file ({size} bytes): {reason}; fetch it again"
        ) from error
    tensors, metadata = {}, {}
    for name, entry in header.items():
        if name == "__metadata__":
            metadata = entry
            continue
        if entry["dtype"] not in ELEMENT_TYPES:
            raise ModelError(
                f"{path}: element type {entry['dtype']!r} is not supported; save the weights as BF16 or F32"
            )
        first, stop = entry["data_offsets"]
        tensors[name] = TensorInfo(path, entry["dtype"], tuple(entry["shape"]), start + first, stop - first)
    return _Shard(path, size, start, tensors, metadata)
