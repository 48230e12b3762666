"""The optimizer's state on a grid as boxes of the folder's tensors: what a rank saves, and what it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor

from mergeopd.errors import StorageError
from mergeopd.storage.boxes import Box, equal_part, flat_boxes
from mergeopd.storage.state_parts import SavedTensors, StatePart
from mergeopd.student.host_adamw import MOMENTS
from mergeopd.student.megatron.architecture import Architecture
from mergeopd.student.megatron.grid import Grid
from mergeopd.student.megatron.layout import EMBEDDING, OUTPUT, Shard, shard, tensor_boxes, tensor_shapes
from mergeopd.student.megatron.model import HiddenModel
from mergeopd.student.megatron.optimizer import MainParameters
from mergeopd.student.megatron.weights import named

# Blocks of rows that each of two stages with the same embedding saves: alternating, because data-parallel
# replicas own different ranges of it.
_NUM_BLOCKS = 32


@torch.no_grad()
def state_parts(
    model: HiddenModel, main: MainParameters, arch: Architecture, grid: Grid
) -> Iterator[StatePart]:
    """Yield this rank's boxes of main parameters and moments by the names of `TorchStudent.state`.

    Raises RuntimeError for an optimizer other than torch's AdamW.
    """
    step, shapes = main.step(), tensor_shapes(arch)
    for name, parameter in named(model).items():
        shape, own = tuple(parameter.shape), main.own(parameter)
        part = shard(name, arch, grid.tensor, grid.tensor_rank)
        ranges = [_common(own, part_of) for part_of in _dealt(name, part, shape, arch, grid)]
        for key, prefix in _prefixes(step).items():
            flat = main.read_own(parameter, key)
            for dealt in ranges:
                for box, at in _positions(shape, dealt):
                    values = flat[at.start - own.start : at.stop - own.start].view(box.shape)
                    for tensor, place, inner in tensor_boxes(part, shape, box):
                        own_values = values[inner.within(box)]
                        yield StatePart(f"{prefix}.{tensor}", shapes[tensor], place, own_values)
                        if key == "param" and step and place.has_first:
                            yield StatePart.full(f"adamw.step.{tensor}", torch.tensor(float(step)))


@torch.no_grad()
def load_parts(
    tensors: SavedTensors, model: HiddenModel, main: MainParameters, arch: Architecture, grid: Grid
) -> None:
    """Restore main parameters and moments of this rank, and its own part of the model's parameters.

    Raises StorageError when parameters differ in their number of updates.
    """
    steps = {int(tensors.read(name)) for name in tensors.shapes if name.startswith("adamw.step.")}
    if len(steps) > 1:
        raise StorageError(f"the checkpoint's parameters differ in their number of updates: {sorted(steps)}")
    step = next(iter(steps), 0)
    for name, parameter in named(model).items():
        part, own = shard(name, arch, grid.tensor, grid.tensor_rank), main.own(parameter)
        values = {}
        for key, prefix in _prefixes(step).items():

            def read(tensor: str, box: Box, prefix: str = prefix) -> Tensor:
                return tensors.read(f"{prefix}.{tensor}", box)

            values[key] = _filled(part, tuple(parameter.shape), own, read)
        main.write_own(parameter, values, step)


def _prefixes(step: int) -> dict[str, str]:
    """Map what AdamW keeps of a parameter to prefixes of names in a checkpoint after `step` updates."""
    return {"param": "master", **({key: f"adamw.{key}" for key in MOMENTS} if step else {})}


def _dealt(name: str, part: Shard, shape: tuple[int, ...], arch: Architecture, grid: Grid) -> Iterator[range]:
    """Yield the flat ranges of a parameter that this rank saves, among the ranks with the same values."""
    numel = prod(shape)
    if part.is_replicated:
        yield equal_part(numel, grid.tensor_rank, grid.tensor)
    elif arch.facts.tied and grid.pipeline > 1 and name in (EMBEDDING, OUTPUT):
        row = numel // shape[0]
        for block in range(int(name == OUTPUT), 2 * _NUM_BLOCKS, 2):
            rows = equal_part(shape[0], block, 2 * _NUM_BLOCKS)
            yield range(rows.start * row, rows.stop * row)
    else:
        yield range(numel)


def _filled(part: Shard, shape: tuple[int, ...], own: range, read: Callable[[str, Box], Tensor]) -> Tensor:
    """Return the elements `own` of a parameter, flat and float32; padding is zero."""
    flat = torch.zeros(len(own), dtype=torch.float32)
    for box, at in _positions(shape, own):
        values = flat[at.start - own.start : at.stop - own.start].view(box.shape)
        for tensor, place, inner in tensor_boxes(part, shape, box):
            values[inner.within(box)] = read(tensor, place)
    return flat


def _positions(shape: tuple[int, ...], flat: range) -> Iterator[tuple[Box, range]]:
    """Yield the boxes of a flat range, each with its own flat range."""
    position = flat.start
    for box in flat_boxes(shape, flat.start, flat.stop):
        yield box, range(position, position + box.numel)
        position += box.numel


def _common(a: range, b: range) -> range:
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))
