"""Static merges of the experts' weights, as baselines: no data and no training.

Experts and base have one shape. A *task vector* is an expert's weights minus the base's. Tensors are merged
one at a time, in float32.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergeopd.models.causal import assembled, build_skeleton, fill, parameter_parts
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.facts import ModelFacts, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MergeTensors = Callable[[str, Tensor, Sequence[Tensor]], Tensor]
"""`(name, base, experts) -> merged` for one tensor, in float32; must not change its arguments."""

_COLLINEAR = 0.9995  # cosine beyond which `slerp` interpolates linearly, since its weights divide by the sine


def weight_average() -> MergeTensors:
    """The mean of the experts' weights (model soups, 2203.05482)."""
    return lambda name, base, experts: torch.stack(list(experts)).mean(0)


def task_arithmetic(scale: float) -> MergeTensors:
    """The base plus `scale` times the sum of all task vectors (2212.04089)."""
    return lambda name, base, experts: base + scale * sum(expert - base for expert in experts)


def ties(density: float, scale: float) -> MergeTensors:
    """The base plus `scale` times the TIES merge of the task vectors (2306.01708).

    Each task vector keeps its `density` largest entries by magnitude, per tensor. Every entry takes the sign
    of the vectors' sum, and is the mean of the vectors that have this sign there.
    """

    def merge(name: str, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        kept = torch.stack([_trimmed(expert - base, density) for expert in experts])
        sign = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
        agrees = (kept.sign() == sign) & (kept != 0)
        return base + scale * (kept * agrees).sum(0) / agrees.sum(0).clamp(min=1)

    return merge


def dare(density: float, scale: float, seed: int) -> MergeTensors:
    """Task arithmetic after DARE (2311.03099): entries are kept with probability `density`, over `density`.

    The random numbers depend on `seed`, the tensor's name and the expert's position.
    """

    def merge(name: str, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        total = torch.zeros_like(base)
        for i, expert in enumerate(experts):
            digest = hashlib.blake2b(f"{seed}\0{name}\0{i}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            mask = torch.bernoulli(torch.full_like(base, density), generator=generator)
            total += mask * (expert - base) / density
        return base + scale * total

    return merge


def slerp() -> MergeTensors:
    """Spherical interpolation of the experts' weights (Shoemake, 1985), each tensor as one vector.

    Two experts have equal weight. Further experts are added one by one with weight 1 / (their position), so
    more than two depend on their order.
    """

    def merge(name: str, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        result = experts[0].clone()
        for i, expert in enumerate(experts[1:], start=2):
            result = _slerp(result, expert, 1.0 / i)
        return result

    return merge


def _trimmed(vector: Tensor, density: float) -> Tensor:
    """Set all but the `density` largest entries by magnitude to 0; at least one stays."""
    flat = vector.flatten()
    keep = flat.abs().topk(max(1, int(density * len(flat)))).indices
    return torch.zeros_like(flat).index_copy(0, keep, flat[keep]).view_as(vector)


def _slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    cosine = float(torch.cosine_similarity(a.flatten().double(), b.flatten().double(), 0))
    if abs(cosine) > _COLLINEAR:
        return (1.0 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1.0 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def why_not(base: Path, experts: Sequence[Path]) -> str | None:
    """Return why the experts' weights cannot be merged into the base's shape; None if they can.

    Embedding and head may be padded to different numbers of rows; all else must match.
    """
    reference = _shapes(base)
    for expert in experts:
        if read_config(expert).get("quantization_config"):
            return f"the weights of {expert.name} are quantised"
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


def static_merge(
    base: Path, experts: Sequence[Path], num_valid: int, device: torch.device, merge: MergeTensors
) -> PreTrainedModel:
    """Return a model of the base's shape with merged weights, in float32, and the base's padding rows."""
    facts, checkpoint = ModelFacts.read(base), Checkpoint.open(base)
    opened = [Checkpoint.open(expert) for expert in experts]
    tensors = [_tensors(ModelFacts.read(expert), o) for expert, o in zip(experts, opened, strict=True)]
    vocabulary = {facts.embedding_name, facts.head_name, facts.head_bias_name}
    model = build_skeleton(base, device, torch.float32)
    parameters = {name for name, _ in model.named_parameters()}
    parts = parameter_parts(facts, checkpoint)

    def merged() -> Iterator[tuple[str, Tensor]]:
        for (parameter, name), tensor in _tensors(facts, checkpoint).items():
            values = checkpoint.read(tensor)
            if parameter in parameters:  # the others are constants of the architecture
                values = values.to(torch.float32, copy=True)
                rows = num_valid if parameter in vocabulary else len(values)
                own = [
                    o.read_slice(t[parameter, name], 0, rows).float()
                    for o, t in zip(opened, tensors, strict=True)
                ]
                values[:rows] = merge(name, values[:rows], own)
            yield tensor, values

    fill(model, dict(assembled(parts, merged(), device, torch.float32)))
    model.tie_weights()
    return model


def _tensors(facts: ModelFacts, checkpoint: Checkpoint) -> dict[tuple[str, str], str]:
    """Map parameters and tensors to tensors; one that alone is a parameter has the parameter's name."""
    return {
        (parameter, parameter if part.expert is None else part.tensor): part.tensor
        for parameter, parts in parameter_parts(facts, checkpoint).items()
        for part in parts
    }


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return shapes by name; of vocabulary-sized tensors without their number of rows."""
    facts, checkpoint = ModelFacts.read(folder), Checkpoint.open(folder)
    vocabulary = {facts.embedding_name, facts.head_name, facts.head_bias_name}
    shapes = {name: checkpoint.tensors[t].shape for (_, name), t in _tensors(facts, checkpoint).items()}
    return {name: shape[1:] if name in vocabulary else shape for name, shape in shapes.items()}
