"""Mapping of Megatron's parameters to Hugging Face tensors: every shard as slices. Pure, no torch.

Names are those of Megatron's local layer spec with the numbers of layer and expert in the whole model. The
same description is used for reading and for export. Experts are whole: they are dealt to ranks, not split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from mergeopd.models.experts import expert_parts, published_name
from mergeopd.storage.boxes import Box
from mergeopd.student.megatron.architecture import Architecture

EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
OUTPUT = "output_layer.weight"
_LAYER = "decoder.layers."
_EXPERT = "mlp.experts.local_experts."
_SHARED = "mlp.shared_experts."

# Transformer Engine's experts of a layer have one module.
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(?P<matrix>linear_fc[12]\.weight)(?P<expert>\d+)")
# Transformer engine keeps a norm inside the linear layer that follows it.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True, slots=True)
class Slice:
    """Indices `start` to `stop` (excluded) of the model folder's tensor `tensor`."""

    tensor: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a parameter: concatenated slices along `dim`, then `padding` rows of zeros.

    `is_replicated` is True for a parameter that is unsharded on every rank of the tensor-parallel group; an
    expert is on the ranks to which it is dealt.
    """

    slices: tuple[Slice, ...]
    dim: int = 0
    padding: int = 0
    is_replicated: bool = False

    @property
    def size(self) -> int:
        """Length along `dim`, padding included."""
        return sum(s.stop - s.start for s in self.slices) + self.padding


def parameter_names(
    arch: Architecture, stage: int, stages: int, experts: range | None = None
) -> tuple[str, ...]:
    """Return the parameters of a pipeline stage in model order, without a tied copy of the embedding.

    Of the experts of a layer only `experts`, if given.
    """
    per_stage = arch.facts.num_layers // stages
    names = [EMBEDDING] if stage == 0 else []
    for layer in range(stage * per_stage, (stage + 1) * per_stage):
        names += [f"{_LAYER}{layer}.{leaf}" for leaf in _leaves(arch, layer, experts)]
    if stage == stages - 1:
        names += [FINAL_NORM] if arch.facts.tied else [FINAL_NORM, OUTPUT]
    return tuple(names)


def global_name(local: str, first_layer: int, first_expert: int = 0) -> str:
    """Return the whole model's name of a rank's (or Transformer Engine's) parameter `local`."""
    if not local.startswith(_LAYER):
        return local
    number, _, leaf = local.removeprefix(_LAYER).partition(".")
    grouped = _GROUPED_EXPERT.fullmatch(leaf)
    if grouped is not None:
        leaf = f"{_EXPERT}{grouped['expert']}.{grouped['matrix']}"
    if leaf.startswith(_EXPERT):
        expert, _, matrix = leaf.removeprefix(_EXPERT).partition(".")
        leaf = f"{_EXPERT}{int(expert) + first_expert}.{matrix}"
    return f"{_LAYER}{int(number) + first_layer}.{_FUSED_NORMS.get(leaf, leaf)}"


def expert_of(name: str) -> int | None:
    """Return the expert to which a parameter belongs; None if all ranks of its stage have a part of it."""
    leaf = name.removeprefix(_LAYER).partition(".")[2]
    return int(leaf.removeprefix(_EXPERT).partition(".")[0]) if leaf.startswith(_EXPERT) else None


def vocab_rows(arch: Architecture, tensor: int) -> int:
    """Return the rows of embedding and head, padded to a multiple of the tensor-parallel size."""
    return -(-arch.facts.vocab_rows // tensor) * tensor


def shard(name: str, arch: Architecture, tensor: int, rank: int) -> Shard:
    """Return the shard of the parameter `name` on `rank` of `tensor` ranks."""
    facts = arch.facts
    if name == EMBEDDING or (name == OUTPUT and facts.tied):
        return _vocabulary(facts.embedding_name, arch, tensor, rank)
    if name == OUTPUT:
        return _vocabulary(facts.head_name, arch, tensor, rank)
    if name == FINAL_NORM:
        return _whole("model.norm.weight", facts.hidden_size)
    number, _, leaf = name.removeprefix(_LAYER).partition(".")
    prefix = f"model.layers.{number}."
    if leaf.startswith("mlp."):
        return _feed_forward(leaf, prefix + "mlp.", arch, tensor, rank)
    if leaf.startswith("self_attention."):
        return _attention(leaf, prefix + "self_attn.", arch, tensor, rank)
    norm = {
        "input_layernorm.weight": "input_layernorm",
        "pre_mlp_layernorm.weight": "post_attention_layernorm",
    }
    return _whole(f"{prefix}{norm[leaf]}.weight", facts.hidden_size)


@cache
def tensor_shapes(arch: Architecture) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of the folder's tensors by name, in the order of their parameters."""
    hidden = arch.facts.hidden_size
    lengths: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in parameter_names(arch, 0, 1):
        part = shard(name, arch, 1, 0)
        for piece in part.slices:
            length = lengths[piece.tensor] = max(lengths.get(piece.tensor, 0), piece.stop)
            shape = (hidden, length) if part.dim else (length, hidden)
            shapes[piece.tensor] = (length,) if name.endswith((".bias", "norm.weight")) else shape
    return MappingProxyType(shapes)


def tensor_boxes(part: Shard, shape: tuple[int, ...], box: Box) -> Iterator[tuple[str, Box, Box]]:
    """Map a box of a parameter, whose shard `part` has the shape `shape`, to boxes of the folder's tensors.

    Yields tensor, box of the tensor, and the same elements as a box of the parameter. Padding is left out.
    """
    dim, position = part.dim, 0
    for piece in part.slices:
        length = piece.stop - piece.start
        own = Box(_put((0,) * len(shape), dim, position), _put(shape, dim, length))
        if (common := own.intersect(box)) is not None:
            start = piece.start + common.start[dim] - position
            yield piece.tensor, Box(_put(common.start, dim, start), common.shape), common
        position += length


def _put(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


def _leaves(arch: Architecture, layer: int, experts: range | None) -> list[str]:
    attention = ["linear_qkv.weight"]
    attention += ["linear_qkv.bias"] if arch.qkv_bias else []
    attention += ["q_layernorm.weight", "k_layernorm.weight"] if arch.qk_norm else []
    return [
        "input_layernorm.weight",
        *(f"self_attention.{leaf}" for leaf in [*attention, "linear_proj.weight"]),
        "pre_mlp_layernorm.weight",
        *_feed_forward_leaves(arch, layer, experts),
    ]


def _feed_forward_leaves(arch: Architecture, layer: int, experts: range | None) -> list[str]:
    matrices = ("linear_fc1.weight", "linear_fc2.weight")
    if arch.experts is None or layer not in arch.experts.layers:
        return [f"mlp.{matrix}" for matrix in matrices]
    shared = (*matrices, "gate_weight") if arch.experts.shared_size else ()
    own = range(arch.experts.count) if experts is None else experts
    return [
        "mlp.router.weight",
        *(f"{_EXPERT}{expert}.{matrix}" for expert in own for matrix in matrices),
        *(f"{_SHARED}{leaf}" for leaf in shared),
    ]


def _attention(leaf: str, prefix: str, arch: Architecture, tensor: int, rank: int) -> Shard:
    module, _, kind = leaf.removeprefix("self_attention.").partition(".")
    if module == "linear_proj":
        span = arch.num_heads * arch.head_dim // tensor
        return Shard((Slice(f"{prefix}o_proj.{kind}", rank * span, (rank + 1) * span),), dim=1)
    if module in ("q_layernorm", "k_layernorm"):
        return _whole(f"{prefix}{module[0]}_norm.{kind}", arch.head_dim)
    # Group by group: the queries of the group, its keys, its values.
    per_group = {
        "q": arch.num_heads // arch.num_groups * arch.head_dim,
        "k": arch.head_dim,
        "v": arch.head_dim,
    }
    groups = arch.num_groups // tensor
    return Shard(
        tuple(
            Slice(f"{prefix}{x}_proj.{kind}", group * rows, (group + 1) * rows)
            for group in range(rank * groups, (rank + 1) * groups)
            for x, rows in per_group.items()
        )
    )


def _feed_forward(leaf: str, prefix: str, arch: Architecture, tensor: int, rank: int) -> Shard:
    ffn_size, experts = arch.ffn_size, arch.experts
    if experts is not None:
        if leaf == "mlp.router.weight":
            return _whole(published_name(arch.facts.model_type, f"{prefix}gate.weight"), experts.count)
        if leaf.startswith(_EXPERT):
            return _expert(leaf.removeprefix(_EXPERT), prefix, arch, experts.size)
        if leaf == f"{_SHARED}gate_weight":
            return _whole(f"{prefix}shared_expert_gate.weight", 1)
        if leaf.startswith(_SHARED):
            prefix, ffn_size = f"{prefix}shared_expert.", experts.shared_size
    span = ffn_size // tensor
    start, stop = rank * span, (rank + 1) * span
    if leaf.endswith("linear_fc2.weight"):
        return Shard((Slice(f"{prefix}down_proj.weight", start, stop),), dim=1)
    return Shard(tuple(Slice(f"{prefix}{x}_proj.weight", start, stop) for x in ("gate", "up")))


def _expert(leaf: str, prefix: str, arch: Architecture, size: int) -> Shard:
    expert, _, matrix = leaf.partition(".")
    is_last = matrix.startswith("linear_fc2")
    parameter = f"{prefix}experts.{'down_proj' if is_last else 'gate_up_proj'}"
    parts = expert_parts(arch.facts.model_type, parameter, int(expert))
    return Shard(tuple(Slice(part.tensor, 0, size) for part in parts), dim=int(is_last))


def _vocabulary(tensor_name: str, arch: Architecture, tensor: int, rank: int) -> Shard:
    rows, span = arch.facts.vocab_rows, vocab_rows(arch, tensor) // tensor
    start, stop = min(rank * span, rows), min((rank + 1) * span, rows)
    return Shard((Slice(tensor_name, start, stop),), padding=span - (stop - start))


def _whole(tensor_name: str, size: int) -> Shard:
    return Shard((Slice(tensor_name, 0, size),), is_replicated=True)
