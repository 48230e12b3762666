"""Conversion of weights between a Hugging Face folder and the shards of a grid, one parameter at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mergeopd.models.causal import assembled, parameter_parts
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.experts import Part, expert_parts, part_of
from mergeopd.models.facts import ModelFacts
from mergeopd.models.weight_files import MAX_FILE_BYTES, write_model
from mergeopd.student.megatron.architecture import Architecture
from mergeopd.student.megatron.grid import Grid
from mergeopd.student.megatron.layout import (
    OUTPUT,
    Shard,
    expert_of,
    global_name,
    parameter_names,
    shard,
    tensor_shapes,
)
from mergeopd.student.megatron.model import HiddenModel


def named(model: HiddenModel) -> dict[str, torch.nn.Parameter]:
    """Return this stage's parameters by their names in the whole model."""
    first = model.first_layer, model.first_expert
    return {global_name(name, *first): p for name, p in model.named_parameters()}


@torch.no_grad()
def read_shards(model: HiddenModel, arch: Architecture, grid: Grid) -> None:
    """Read this rank's slices of the folder's tensors into the model, in the model's dtype.

    Raises ModelError when a tensor or a part of it is missing.
    """
    source = _Source(arch.facts)
    parameters = named(model)
    own_experts = None if arch.experts is None else grid.own_experts(arch.experts.count)
    expected = set(parameter_names(arch, grid.stage, grid.pipeline, own_experts))
    if arch.facts.tied and grid.is_last_stage and grid.stage > 0:
        expected.add(OUTPUT)
    if parameters.keys() != expected:
        odd = ", ".join(sorted(parameters.keys() ^ expected)[:3])
        raise RuntimeError(f"this version of megatron-core has other parameter names: {odd}")
    for name, parameter in parameters.items():
        part = shard(name, arch, grid.tensor, grid.tensor_rank)

        def read(tensor: str, start: int, stop: int, dim: int = part.dim) -> Tensor:
            return source.read_slice(tensor, start, stop, dim)

        tensor = assemble(part, read)
        if tensor.shape != parameter.shape:
            raise RuntimeError(f"{name}: {list(tensor.shape)} read, {list(parameter.shape)} expected")
        parameter.copy_(tensor)


class _Source:
    """A model's folder, read by published names; its experts may be stored together, as in the module."""

    def __init__(self, facts: ModelFacts) -> None:
        self._facts, self._checkpoint = facts, Checkpoint.open(facts.folder)
        self._parts = parameter_parts(facts, self._checkpoint)

    def read_slice(self, tensor: str, start: int, stop: int, dim: int) -> Tensor:
        parameter, part = part_of(self._facts.model_type, tensor)
        stored = self._parts.get(parameter, ())
        if part.expert is None:
            return self._checkpoint.read_slice(stored[0].tensor if stored else tensor, start, stop, dim)
        if len(stored) > 1:
            return self._checkpoint.read_slice(tensor, start, stop, dim)
        [matrix] = self._checkpoint.read_slice(parameter, part.expert, part.expert + 1)
        num_pieces = len(expert_parts(self._facts.model_type, parameter, 0))
        rows: Tensor = matrix[part.rows(len(matrix) // num_pieces)]
        return rows.narrow(dim, start, stop - start)


@torch.no_grad()
def whole_tensors(
    part_of: Callable[[str], Tensor], like: Tensor, arch: Architecture, grid: Grid, *, everywhere: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield the folder's tensors one at a time, assembled on rank 0 from every rank's parts.

    `part_of` returns this rank's part of a parameter of its stage, in the dtype and on the device of `like`;
    every rank of the stage that has the parameter calls it at the same time. Every rank must exhaust the
    iterator. With `everywhere` all ranks get the tensors, else only rank 0. Besides its own parts and what
    its caller keeps, rank 0 holds a tensor and one rank's part of it, and other ranks at most their part.
    """
    shapes, rank = tensor_shapes(arch), dist.get_rank()
    num_experts = 0 if arch.experts is None else arch.experts.count
    for stage in range(grid.pipeline):
        for name in parameter_names(arch, stage, grid.pipeline):
            first = shard(name, arch, grid.tensor, 0)
            expert = expert_of(name)
            if expert is None:
                owners = [grid.rank_of(t, stage) for t in range(1 if first.is_replicated else grid.tensor)]
            else:
                owners = [grid.rank_of_expert(expert, num_experts, stage)]
            parts = {owner: shard(name, arch, grid.tensor, t) for t, owner in enumerate(owners)}
            is_here = expert is None or expert in grid.own_experts(num_experts)
            own = part_of(name) if stage == grid.stage and is_here else None
            for tensor in dict.fromkeys(piece.tensor for piece in first.slices):
                if own is not None and rank in parts and rank != 0:
                    _send(_take(own, parts[rank], tensor), 0)
                if rank == 0 or everywhere:
                    whole = like.new_empty(shapes[tensor])
                    if rank == 0:
                        _join(whole, own, parts, tensor)
                    if everywhere:
                        dist.broadcast(whole, src=0)
                    yield tensor, whole
                    del whole  # before the next one is allocated


def by_parameter(
    tensors: Iterator[tuple[str, Tensor]], arch: Architecture, like: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of transformers' module that are made of the folder's tensors."""
    parts: dict[str, list[Part]] = {}
    for tensor in tensor_shapes(arch):
        parameter, part = part_of(arch.facts.model_type, tensor)
        parts.setdefault(parameter, []).append(part)
    return assembled(parts, tensors, like.device, like.dtype)


def export(tensors: Iterator[tuple[str, Tensor]], source: Path, folder: Path) -> None:
    """Write the tensors that rank 0 yields as a Hugging Face folder like `source`; one file is in memory.

    Collective; returns when the folder is complete.
    """
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_model(tensors, source, folder, MAX_FILE_BYTES)
    deque(tensors, maxlen=0)  # the other ranks only send
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


def _join(whole: Tensor, own: Tensor | None, parts: Mapping[int, Shard], tensor: str) -> None:
    """Fill a tensor on rank 0 with every rank's slices of it; `own` is this rank's part of the parameter."""
    for owner, part in parts.items():
        slices = _slices(part, tensor)
        if own is not None and owner == 0:
            values = _take(own, part, tensor)
        else:
            shape = list(whole.shape)
            shape[part.dim] = sum(size for _, size, _ in slices)
            values = whole.new_empty(shape)
            if values.numel():
                dist.recv(values, src=owner)
        sizes = [size for _, size, _ in slices]
        for (_, size, start), block in zip(slices, torch.split(values, sizes, part.dim), strict=True):
            whole.narrow(part.dim, start, size).copy_(block)
        del values, block  # before the next part is received


def _send(values: Tensor, rank: int) -> None:
    if values.numel():  # a rank may have padding only
        dist.send(values.contiguous(), dst=rank)


def _take(own: Tensor, part: Shard, tensor: str) -> Tensor:
    """Return a rank's slices of a tensor, joined, from its part of a parameter."""
    blocks = [own.narrow(part.dim, position, size) for position, size, _ in _slices(part, tensor)]
    return torch.cat(blocks, part.dim) if len(blocks) > 1 else blocks[0]


def _slices(part: Shard, tensor: str) -> list[tuple[int, int, int]]:
    """Return the slices of `tensor` in a shard: position in the shard, size, position in the tensor."""
    slices, position = [], 0
    for piece in part.slices:
        size = piece.stop - piece.start
        if piece.tensor == tensor:
            slices.append((position, size, piece.start))
        position += size
    return slices
