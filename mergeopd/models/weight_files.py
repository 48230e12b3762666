"""Write a Hugging Face folder from a stream of tensors, with the tensors of one file in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mergeopd.models.causal import DTYPES
from mergeopd.models.checkpoint import INDEX
from mergeopd.models.facts import read_config
from mergeopd.models.hf_folder import copy_companions

MAX_FILE_BYTES = 5_000_000_000
"""Size of the files of an exported model."""


def write_model(
    tensors: Iterable[tuple[str, Tensor]],
    source: Path,
    folder: Path,
    max_bytes: int,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Write tensors, and configuration and tokenizer of the folder `source`, into an existing folder.

    The tensors are written in order, in files of at most `max_bytes` or one tensor, with an index if there
    are several. config.json gets the first tensor's dtype, or keeps its own and gets the settings of
    quantised tensors. Raises ModelError if `source` has no config.
    """
    files: list[tuple[list[str], int]] = []
    dtype = None
    for part, num_bytes in _parts(tensors, max_bytes):
        dtype = dtype or next(iter(part.values())).dtype
        save_file(part, folder / _name(len(files), None), metadata={"format": "pt"})
        files.append((list(part), num_bytes))
    names = {number: _name(number, len(files)) for number in range(len(files))}
    for number, name in names.items():
        (folder / _name(number, None)).rename(folder / name)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(num_bytes for _, num_bytes in files)},
            "weight_map": {
                tensor: names[number] for number, (part, _) in enumerate(files) for tensor in part
            },
        }
        _write_json(folder / INDEX, index)
    config = read_config(source)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    else:
        config.pop("torch_dtype", None)
        config["dtype"] = next(name for name, value in DTYPES.items() if value == dtype)
    _write_json(folder / "config.json", config)
    copy_companions(source, folder)


def _parts(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Yield the tensors of each file, on the CPU, and their bytes; the dict is emptied for the next file."""
    held: dict[str, Tensor] = {}
    num_bytes = 0
    for name, tensor in tensors:
        if held and num_bytes + tensor.nbytes > max_bytes:
            yield held, num_bytes
            held.clear()
            num_bytes = 0
        held[name] = tensor.cpu().contiguous()
        num_bytes += tensor.nbytes
    if held:
        yield held, num_bytes


def _name(number: int, count: int | None) -> str:
    """Return the name of file `number` (from 0) of `count`; with None, a temporary one."""
    if count == 1:
        return "model.safetensors"
    return f"model-{number + 1:05}" + (".partial" if count is None else f"-of-{count:05}.safetensors")


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
