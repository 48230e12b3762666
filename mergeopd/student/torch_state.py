"""The state of a torch student as boxes of a folder's tensors: what a process saves, and what it reads."""

from __future__ import annotations

from collections.abc import Iterator
from operator import add

import torch
from torch import Tensor

from mergeopd.models.experts import parts_of
from mergeopd.storage.boxes import Box
from mergeopd.storage.state_parts import SavedTensors, StatePart, dealt_parts
from mergeopd.student.adamw import AdamW
from mergeopd.student.host_adamw import MOMENTS
from mergeopd.student.whole_weights import Weights


def state_parts(weights: Weights, optimizer: AdamW) -> Iterator[StatePart]:
    """Yield this process's boxes of masters and moments; processes with the same ones divide them."""
    own: dict[str, StatePart] = {}
    steps: dict[str, Tensor] = {}
    for name, master in weights.masters.items():
        step = optimizer.step_count(name)
        kept = {f"adamw.{key}": values for key, values in optimizer.moments(name).items()}
        for key, values in {"master": master.detach(), **kept}.items():
            for part in weights.parts(name, values):
                own[f"{key}.{part.name}"] = part
                if key == "master" and step is not None:
                    steps[f"master.{part.name}"] = step
    for piece in dealt_parts({key: part.tensor for key, part in own.items()}, *weights.replica):
        whole = own[piece.name]
        box = Box(tuple(map(add, whole.box.start, piece.box.start)), piece.box.shape)
        yield StatePart(piece.name, whole.shape, box, piece.tensor)
        if piece.name in steps and box.has_first:
            yield StatePart.full(f"adamw.step.{whole.name}", steps[piece.name])


@torch.no_grad()
def load_parts(tensors: SavedTensors, weights: Weights, optimizer: AdamW) -> None:
    """Restore the masters of this process and what the optimizer keeps of them."""
    saved = tensors.shapes
    for name, master in weights.masters.items():
        _fill(tensors, weights, name, master, "master")
        first, *_ = parts_of(weights.facts.model_type, name, weights.shapes[name][0])
        step = f"adamw.step.{first.tensor}"
        if step in saved:
            moments = {key: torch.empty_like(master) for key in MOMENTS}
            for key, values in moments.items():
                _fill(tensors, weights, name, values, f"adamw.{key}")
            optimizer.load(name, tensors.read(step), moments)


def _fill(tensors: SavedTensors, weights: Weights, name: str, values: Tensor, key: str) -> None:
    for part in weights.parts(name, values):
        if part.box.numel:
            part.tensor.copy_(tensors.read(f"{key}.{part.name}", part.box))
