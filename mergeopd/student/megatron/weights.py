"""Conversion of weights between a Hugging Face folder and the shards of a grid, one parameter at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from mergeopd.models.causal import DTYPES, tensor_names
from mergeopd.models.checkpoint import INDEX, Checkpoint
from mergeopd.models.facts import ModelFacts
from mergeopd.models.hf_folder import copy_companions
from mergeopd.student.megatron.architecture import Architecture
from mergeopd.student.megatron.grid import Grid
from mergeopd.student.megatron.layout import OUTPUT, Shard, global_name, parameter_names, shard, tensor_shapes
from mergeopd.student.megatron.model import HiddenModel

_MAX_FILE_BYTES = 5_000_000_000


def named(model: HiddenModel) -> dict[str, torch.nn.Parameter]:
    """Return this stage's parameters by their names in the whole model."""
    return {global_name(name, model.first_layer): p for name, p in model.named_parameters()}


@torch.no_grad()
def read_shards(model: HiddenModel, arch: Architecture, grid: Grid) -> None:
    """Read this rank's slices of the folder's tensors into the model, in the model's dtype.

    Raises ModelError when a tensor or a part of it is missing.
    """
    checkpoint = Checkpoint.open(arch.facts.folder)
    stored = tensor_names(arch.facts, checkpoint)
    parameters = named(model)
    expected = set(parameter_names(arch, grid.stage, grid.pipeline))
    if arch.facts.tied and grid.is_last_stage and grid.stage > 0:
        expected.add(OUTPUT)
    if parameters.keys() != expected:
        odd = ", ".join(sorted(parameters.keys() ^ expected)[:3])
        raise RuntimeError(f"this version of megatron-core has other parameter names: {odd}")
    for name, parameter in parameters.items():
        part = shard(name, arch, grid.tensor, grid.tensor_rank)

        def read(tensor: str, start: int, stop: int, dim: int = part.dim) -> Tensor:
            return checkpoint.read_slice(stored[tensor], start, stop, dim)

        tensor = assemble(part, read)
        if tensor.shape != parameter.shape:
            raise RuntimeError(f"{name}: {list(tensor.shape)} read, {list(parameter.shape)} expected")
        parameter.copy_(tensor)


@torch.no_grad()
def whole_tensors(
    part_of: Callable[[str], Tensor], like: Tensor, arch: Architecture, grid: Grid, *, everywhere: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield the folder's tensors one at a time, assembled on rank 0 from every rank's parts.

    `part_of` returns this rank's part of a parameter of its stage, in the dtype and on the device of `like`;
    every rank of the stage calls it for the same parameter at the same time. Every rank must exhaust the
    iterator. With `everywhere` all ranks get the tensors, else only rank 0. A rank holds one parameter at a
    time, besides those that its caller keeps.
    """
    shapes, rank = tensor_shapes(arch), dist.get_rank()
    for stage in range(grid.pipeline):
        for name in parameter_names(arch, stage, grid.pipeline):
            first = shard(name, arch, grid.tensor, 0)
            owners = [grid.rank_of(t, stage) for t in range(1 if first.is_replicated else grid.tensor)]
            own = part_of(name) if stage == grid.stage else None
            if own is not None and rank in owners and rank != 0:
                dist.send(own.contiguous(), dst=0)
            parts = [shard(name, arch, grid.tensor, t) for t in range(len(owners))]
            whole: dict[str, Tensor] = {}
            if rank == 0:
                tensors = [
                    own if own is not None and owner == 0 else _receive(owner, part, shapes, like)
                    for owner, part in zip(owners, parts, strict=True)
                ]
                whole = _join(parts, tensors, shapes)
            elif everywhere:
                names = dict.fromkeys(piece.tensor for part in parts for piece in part.slices)
                whole = {tensor: like.new_empty(shapes[tensor]) for tensor in names}
            if everywhere:
                for tensor in whole.values():
                    dist.broadcast(tensor, src=0)
            yield from whole.items()


def export(parts: Mapping[str, Tensor], arch: Architecture, grid: Grid, folder: Path) -> None:
    """Write a Hugging Face folder from all ranks' parameters; rank 0 writes and holds one file in memory.

    Collective; returns when the folder is complete.
    """
    like = next(iter(parts.values()))
    shapes = tensor_shapes(arch)
    meta = {name: torch.empty(shape, dtype=like.dtype, device="meta") for name, shape in shapes.items()}
    split = split_torch_state_dict_into_shards(meta, max_shard_size=_MAX_FILE_BYTES)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    pending: dict[str, dict[str, Tensor]] = {}
    for name, tensor in whole_tensors(parts.__getitem__, like, arch, grid, everywhere=False):
        file = split.tensor_to_filename[name]
        held = pending.setdefault(file, {})
        held[name] = tensor.cpu().contiguous()
        if len(held) == len(split.filename_to_tensors[file]):
            save_file(pending.pop(file), folder / file, metadata={"format": "pt"})
    if dist.get_rank() == 0:
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _write_config(arch.facts, folder, like.dtype)
        copy_companions(arch.facts.folder, folder)
    dist.barrier()


def assemble(part: Shard, read: Callable[[str, int, int], Tensor]) -> Tensor:
    """Build the shard `part` from `read(tensor, start, stop)`, called once for each tensor of the folder."""
    spans: dict[str, tuple[int, int]] = {}
    for piece in part.slices:
        start, stop = spans.get(piece.tensor, (piece.start, piece.stop))
        spans[piece.tensor] = min(start, piece.start), max(stop, piece.stop)
    blocks = {name: read(name, *span) for name, span in spans.items()}
    pieces = [
        blocks[p.tensor].narrow(part.dim, p.start - spans[p.tensor][0], p.stop - p.start) for p in part.slices
    ]
    if part.padding:
        pieces.append(pieces[0].new_zeros(part.padding, *pieces[0].shape[1:]))
    return torch.cat(pieces, part.dim) if len(pieces) > 1 else pieces[0]


def _receive(owner: int, part: Shard, shapes: Mapping[str, tuple[int, ...]], like: Tensor) -> Tensor:
    shape = list(shapes[part.slices[0].tensor])
    shape[part.dim] = part.size
    tensor = like.new_empty(shape)
    dist.recv(tensor, src=owner)
    return tensor


def _join(
    parts: Sequence[Shard], tensors: Sequence[Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = {}
    for part, tensor in zip(parts, tensors, strict=True):
        position = 0
        for piece in part.slices:
            if piece.tensor not in whole:
                whole[piece.tensor] = tensor.new_empty(shapes[piece.tensor])
            length = piece.stop - piece.start
            target = whole[piece.tensor].narrow(part.dim, piece.start, length)
            target.copy_(tensor.narrow(part.dim, position, length))
            position += length
    return whole


def _write_config(facts: ModelFacts, folder: Path, dtype: torch.dtype) -> None:
    config = json.loads((facts.folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = next(name for name, value in DTYPES.items() if value == dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
