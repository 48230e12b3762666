"""The plain weight average of the experts, as a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergeopd.models.causal import build_skeleton, fill, tensor_names
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.facts import ModelFacts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def why_not(base: Path, experts: Sequence[Path]) -> str | None:
    """Return why the experts' weights cannot be averaged into the base's shape; None if they can.

    Embedding and head may be padded to different numbers of rows; all else must match.
    """
    reference = _shapes(base)
    for expert in experts:
        shapes = _shapes(expert)
        if shapes.keys() != reference.keys():
            odd = sorted(shapes.keys() ^ reference.keys())[0]
            return f"{expert.name} and {base.name} have different tensors ({odd})"
        for name, shape in shapes.items():
            if shape != reference[name]:
                return (
                    f"{name} has shape {list(shape)} in {expert.name}, {list(reference[name])} in {base.name}"
                )
    return None


def average(base: Path, experts: Sequence[Path], num_valid: int, device: torch.device) -> PreTrainedModel:
    """Return a model of the base's shape with the mean of the experts' weights, and the base's pad rows."""
    facts, checkpoint = ModelFacts.read(base), Checkpoint.open(base)
    opened = [Checkpoint.open(expert) for expert in experts]
    names = [tensor_names(ModelFacts.read(expert), o) for expert, o in zip(experts, opened, strict=True)]
    vocabulary = {facts.embedding_name, facts.head_name, facts.head_bias_name}
    model = build_skeleton(base, device, torch.float32)
    parameters = {name for name, _ in model.named_parameters()}
    weights: dict[str, Tensor] = {}
    for name, tensor in tensor_names(facts, checkpoint).items():
        if name not in parameters:  # a constant of the architecture
            weights[name] = checkpoint.read(tensor).to(device)
            continue
        mean = checkpoint.read(tensor).to(torch.float32, copy=True)
        rows = num_valid if name in vocabulary else len(mean)
        parts = [o.read_slice(n[name], 0, rows).float() for o, n in zip(opened, names, strict=True)]
        mean[:rows] = torch.stack(parts).mean(0)
        weights[name] = mean.to(device)
    fill(model, weights)
    model.tie_weights()
    return model


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return shapes by name; of vocabulary-sized tensors without their number of rows."""
    facts, checkpoint = ModelFacts.read(folder), Checkpoint.open(folder)
    vocabulary = {facts.embedding_name, facts.head_name, facts.head_bias_name}
    shapes = {n: checkpoint.tensors[t].shape for n, t in tensor_names(facts, checkpoint).items()}
    return {name: shape[1:] if name in vocabulary else shape for name, shape in shapes.items()}
