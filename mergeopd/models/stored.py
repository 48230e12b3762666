"""How tensors of a checkpoint make up the parameters of its model: as they are, or quantised. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from mergeopd.errors import ModelError
from mergeopd.models.checkpoint import FLOATS, Checkpoint, TensorInfo
from mergeopd.models.facts import QUANTISED_HEAD, ModelFacts
from mergeopd.models.quantization import Encoding, Quantization, torchao_encoding

_DATA: Mapping[str, str] = {
    "int-quantized": "I8",
    "float-quantized": "F8_E4M3",
    "pack-quantized": "I32",
    "nvfp4-pack-quantized": "U8",
    "mxfp4-pack-quantized": "U8",
    "fp8": "F8_E4M3",
    "Int8Tensor": "I8",
    "Float8Tensor": "F8_E4M3",
}
# Tensors of quantised folders that are no weights: scales of activations and of the cache.
_UNUSED = frozenset(
    (
        *("input_scale", "input_zero_point", "input_global_scale", "activation_scale"),
        *("output_scale", "output_zero_point", "q_scale", "k_scale", "v_scale"),
        *("q_zero_point", "k_zero_point", "v_zero_point"),
    )
)
_SCALES = ("weight_scale", "weight_scale_inv", "weight_packed")


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight's shape, and the tensors of a checkpoint that it is decoded from, by role.

    Without an `encoding` it is the one tensor itself.
    """

    shape: tuple[int, ...]
    tensors: Mapping[str, str]
    encoding: Encoding | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)


def stored_weights(facts: ModelFacts, checkpoint: Checkpoint) -> dict[str, StoredWeight]:
    """Return how each weight and buffer of a checkpoint is stored, by its name; reads headers only.

    The prediction head is among them under the name of its tensor. Raises ModelError for element types that
    are no weights, missing scales, tensors that do not fit their scales, and a quantised head.
    """
    if facts.quantization is None:
        named = {name: StoredWeight(info.shape, {"": name}) for name, info in checkpoint.tensors.items()}
    elif facts.quantization.method == "torchao":
        named = dict(_of_torchao(checkpoint))
    else:
        named = dict(_of_modules(facts.quantization, checkpoint))
    for name, stored in named.items():
        if stored.encoding is None:
            _check_float(checkpoint, name)
        elif name in (facts.head_name, facts.embedding_name):
            raise ModelError(f"{checkpoint.folder}: {QUANTISED_HEAD.format(name=name)}")
    return named


def num_weights(facts: ModelFacts, checkpoint: Checkpoint) -> int:
    """Return the number of weights of a model, quantised or not; reads headers only."""
    return sum(stored.numel for stored in stored_weights(facts, checkpoint).values())


def _of_modules(quantization: Quantization, checkpoint: Checkpoint) -> Iterator[tuple[str, StoredWeight]]:
    """Pair the quantised weights of modules with their scales, which stand beside them."""
    modules: dict[str, dict[str, str]] = {}
    for name in checkpoint.tensors:
        module, _, role = name.rpartition(".")
        modules.setdefault(module, {})[role] = name
    for module, roles in modules.items():
        encoding = None
        if any(role in roles for role in _SCALES):
            encoding = quantization.encoding(module)
            if encoding is None:
                raise ModelError(
                    f"{checkpoint.folder}: {module!r} is quantised, but no group of quantization_config in "
                    "config.json names it; fetch both again"
                )
            yield f"{module}.weight", _quantised(checkpoint, f"{module}.weight", encoding, roles)
        used = () if encoding is None else encoding.roles
        for role, name in roles.items():
            if role not in used and role not in _UNUSED:
                yield name, StoredWeight(checkpoint.tensors[name].shape, {"": name})


def _of_torchao(checkpoint: Checkpoint) -> Iterator[tuple[str, StoredWeight]]:
    """Read torchao's description of every tensor in the headers' metadata."""
    parts = set()
    for key, text in checkpoint.metadata.items():
        module, dot, leaf = key.rpartition(".")
        if not dot or leaf != "weight":
            continue
        attributes = json.loads(text)
        if attributes.get("_type") not in ("Tensor", None):
            encoding = torchao_encoding(checkpoint.folder, key, attributes)
            roles = {role: f"{module}.{role}" for role in encoding.roles}
            roles = {role: name for role, name in roles.items() if name in checkpoint.tensors}
            yield key, _quantised(checkpoint, key, encoding, roles)
            parts |= {*roles.values()}
    for name, info in checkpoint.tensors.items():
        if name not in parts:
            yield name, StoredWeight(info.shape, {"": name})


def _quantised(
    checkpoint: Checkpoint, name: str, encoding: Encoding, roles: Mapping[str, str]
) -> StoredWeight:
    missing = [role for role in encoding.roles if role not in roles]
    if missing:
        raise ModelError(
            f"{checkpoint.folder}: {name!r} is quantised ({encoding.format}), but its {missing[0]!r} is "
            "missing; fetch the files again"
        )
    infos = {role: checkpoint.tensors[roles[role]] for role in encoding.roles}
    data = infos[encoding.roles[0]]
    expected = _DATA.get(encoding.format, data.dtype)
    if data.dtype != expected:
        raise ModelError(
            f"{checkpoint.folder}: {name!r} has elements of type {data.dtype}, the format {encoding.format} "
            f"has {expected}; config.json and the weights are not of one checkpoint"
        )
    stored = StoredWeight(
        _shape(checkpoint, data, roles.get("weight_shape"), encoding),
        {role: roles[role] for role in encoding.roles},
        encoding,
    )
    _check_scale(checkpoint, name, stored, infos[encoding.roles[1]])
    return stored


def _shape(
    checkpoint: Checkpoint, data: TensorInfo, shape: str | None, encoding: Encoding
) -> tuple[int, ...]:
    """Return a weight's shape: from the tensor named `shape`, if there is one, or from its data."""
    if shape is not None:
        return checkpoint.read_integers(shape)
    if encoding.format.endswith("fp4-pack-quantized"):
        return (*data.shape[:-1], 2 * data.shape[-1])
    return data.shape


def _check_scale(checkpoint: Checkpoint, name: str, stored: StoredWeight, scale: TensorInfo) -> None:
    """Refuse scales that do not cover the weight; `stored` is quantised."""
    assert stored.encoding is not None
    settings, (rows, columns) = stored.encoding.settings, stored.shape
    weights = settings.get("weights", {})
    group, block = weights.get("group_size"), weights.get("block_structure") or settings.get("block")
    expected = {
        "tensor": 1,
        "channel": rows,
        "group": rows * -(-columns // (group or columns)),
        "tensor_group": rows * -(-columns // (group or columns)),
        "block": 1 if not block else -(-rows // block[0]) * -(-columns // block[1]),
    }
    own = settings.get("block_size")
    wanted = prod(stored.shape) // prod(own) if own else expected.get(weights.get("strategy", "block"))
    if wanted != prod(scale.shape):
        raise ModelError(
            f"{checkpoint.folder}: {name!r} of shape {list(stored.shape)} has {prod(scale.shape)} scales, "
            f"its format {stored.encoding.format} needs {wanted}; config.json and the weights are not of one "
            "checkpoint"
        )


def _check_float(checkpoint: Checkpoint, name: str) -> None:
    if checkpoint.tensors[name].dtype not in FLOATS:
        info = checkpoint.tensors[name]
        raise ModelError(
            f"{info.file}: {name!r} has elements of type {info.dtype} and no scales that config.json "
            "describes; fetch the model's own files, or save the weights as BF16 or F32"
        )
