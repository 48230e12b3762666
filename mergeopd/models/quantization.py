"""Formats of quantised weights, from config.json only: how tensors of a folder become a parameter. No torch.

What `quantization_config` says of activations is left out: weights are decoded, and multiplied by activations
of the teacher's precision.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from mergeopd.errors import ModelError

INSTALL = "pip install 'mergeopd[quantize]'"
# Roles of tensors: what stands after a module's name. The first is the data.
_NAIVE = ("weight", "weight_scale")
_ROLES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("int-quantized", "float-quantized", "naive-quantized"), _NAIVE),
    "pack-quantized": ("weight_packed", "weight_scale", "weight_shape"),
    "nvfp4-pack-quantized": ("weight_packed", "weight_scale", "weight_global_scale"),
    "mxfp4-pack-quantized": ("weight_packed", "weight_scale"),
}
_ZERO_POINT = "weight_zero_point"
_TORCHAO_CLASSES = ("Int8Tensor", "Float8Tensor")
_METHODS = ("compressed-tensors", "fp8 (scales of blocks)", "torchao")
_REMEDY = "name a folder with float weights, or let servers score with this one (`served` in the card)"
_SAVED_AS_FLOATS = "make a folder with float weights: AutoModelForCausalLM.from_pretrained({})"
_REMEDIES = {
    "awq": (
        "convert it with compressed-tensors: convert_checkpoint(folder, new_folder, "
        "AutoAWQConverter.from_pretrained(folder)), or let servers score with it (`served` in the card)"
    ),
    "bitsandbytes": f"{_SAVED_AS_FLOATS.format('folder')}.dequantize().save_pretrained(new_folder)",
    "mxfp4": (
        _SAVED_AS_FLOATS.format("folder, quantization_config=Mxfp4Config(dequantize=True)")
        + ".save_pretrained(new_folder)"
    ),
}


@dataclass(frozen=True, slots=True)
class Encoding:
    """How one quantised weight is stored.

    `roles` are its tensors, after the module's name, the data first. `settings` are those of the format: a
    group of compressed-tensors, the block size of fp8, the attributes of a torchao tensor.
    """

    format: str
    roles: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def packed(self) -> Literal["Int8Tensor", "Float8Tensor"] | None:
        """The class of torchao that holds the weight in memory as it is stored; None: it is decoded."""
        if self.format in _TORCHAO_CLASSES:
            return "Int8Tensor" if self.format == "Int8Tensor" else "Float8Tensor"
        weights = self.settings.get("weights", {})
        is_by_row = (
            self.roles == _NAIVE and weights.get("num_bits", 8) == 8 and weights.get("strategy") == "channel"
        )
        if not is_by_row:
            return None
        return "Int8Tensor" if weights.get("type", "int") == "int" else "Float8Tensor"


@dataclass(frozen=True, slots=True)
class Quantization:
    """The `quantization_config` of a folder, in a format that can be read.

    `groups` pairs patterns of module names with their encoding; torchao's are in the headers of the weights.
    """

    method: str
    groups: tuple[tuple[tuple[str, ...], Encoding], ...]
    quantizes_activations: bool

    @property
    def is_packed(self) -> bool:
        """Whether all weights stay in memory as they are stored."""
        return all(encoding.packed is not None for _, encoding in self.groups)

    def encoding(self, module: str) -> Encoding | None:
        """Return the encoding of a linear module's weight; None if no group has it."""
        for targets, encoding in self.groups:
            if any(_matches(module, target) for target in targets):
                return encoding
        return None


def read_quantization(path: Path, config: Mapping[str, Any]) -> Quantization | None:
    """Read `quantization_config` of the file `path`; None without one.

    Raises ModelError for formats without a loader, and for missing packages.
    """
    settings = config.get("quantization_config")
    if not settings:
        return None
    if not isinstance(settings, Mapping):
        raise ModelError(f"{path}: quantization_config must be a mapping, not {settings!r}")
    method = str(settings.get("quant_method"))
    parsers = {"compressed-tensors": _compressed, "fp8": _fp8, "torchao": _torchao}
    if method not in parsers:
        raise ModelError(
            f"{path}: the weights are quantised as {method}, which has no loader here; read are "
            f"{', '.join(_METHODS)}; {_REMEDIES.get(method, _REMEDY)}"
        )
    return parsers[method](path, settings)


def torchao_encoding(path: Path, name: str, attributes: Mapping[str, Any]) -> Encoding:
    """Return the encoding of the parameter `name` from torchao's description in the header of `path`.

    Raises ModelError for tensor classes that cannot be read.
    """
    kind, data = str(attributes.get("_type")), tuple(attributes.get("_tensor_data_names", ()))
    if kind not in _TORCHAO_CLASSES or not {"qdata", "scale"} <= {*data} <= {"qdata", "scale", "zero_point"}:
        extra = "" if kind not in _TORCHAO_CLASSES else f" with {', '.join(data)}"
        raise ModelError(
            f"{path}: {name!r} is stored as {kind}{extra} of torchao; read are weight-only "
            f"{' and '.join(_TORCHAO_CLASSES)}; {_REMEDY}"
        )
    block_size = attributes["_data"].get("block_size")
    names = [f"_weight_{role}" for role in ("qdata", "scale", "zero_point") if role in data]
    return Encoding(kind, tuple(names), {"block_size": block_size})


def _compressed(path: Path, config: Mapping[str, Any]) -> Quantization:
    if config.get("quantization_status", "compressed") != "compressed":
        status = config["quantization_status"]
        raise ModelError(
            f"{path}: the weights of this folder are not compressed (quantization_status: {status}); "
            "save it compressed, or name the folder with float weights"
        )
    for key in ("sparsity_config", "transform_config"):
        own = config.get(key) or {}
        if own and own.get("format", "") != "dense":
            raise ModelError(f"{path}: {key} of compressed-tensors is not supported; {_REMEDY}")
    groups, activations = [], False
    for name, group in (config.get("config_groups") or {}).items():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise ModelError(
                f"{path}: the group {name!r} of quantization_config does not say how weights are "
                f"quantised; {_REMEDY}"
            )
        form = str(group.get("format") or config.get("format"))
        roles = _ROLES.get(form)
        if roles is None or group["weights"].get("actorder") == "group":
            what = form if roles is None else f"{form} with actorder: group"
            raise ModelError(
                f"{path}: the format {what} of compressed-tensors has no loader here; read are "
                f"{', '.join(_ROLES)}; {_REMEDY}"
            )
        weights = {"strategy": _strategy(group["weights"]), **_given(group["weights"])}
        if not weights.get("symmetric", True):
            roles = (*roles, _ZERO_POINT)
        encoding = Encoding(form, roles, MappingProxyType({**group, "weights": weights}))
        groups.append((tuple(group.get("targets") or ()), encoding))
        activations |= bool(group.get("input_activations") or group.get("output_activations"))
    for _, encoding in groups:
        _require(path, "compressed-tensors", "torchao" if encoding.packed else "compressed_tensors")
    return Quantization("compressed-tensors", tuple(groups), activations)


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def _strategy(weights: Mapping[str, Any]) -> str:
    """Return which weights share a scale where a group does not say it, as compressed-tensors does."""
    group_size = weights.get("group_size")
    return "tensor" if group_size is None else "group" if group_size > 0 else "channel"


def _fp8(path: Path, config: Mapping[str, Any]) -> Quantization:
    block = config.get("weight_block_size", [128, 128])
    is_pair = isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    if block is not None and not is_pair:
        raise ModelError(f"{path}: weight_block_size must be two positive integers, not {block!r}")
    roles = ("weight", "weight_scale_inv")
    encoding = Encoding("fp8", roles, {"block": None if block is None else tuple(block)})
    return Quantization("fp8", ((("Linear",), encoding),), quantizes_activations=True)


def _torchao(path: Path, config: Mapping[str, Any]) -> Quantization:
    _require(path, "torchao", "torchao")
    kind = str((config.get("quant_type") or {}).get("default", {}).get("_type", ""))
    return Quantization("torchao", (), "Activation" in kind)


def _require(path: Path, method: str, package: str) -> None:
    if find_spec(package) is None:
        raise ModelError(
            f"{path}: the weights are quantised as {method}, which needs the package "
            f"{package.replace('_', '-')}: {INSTALL}"
        )


def _matches(module: str, target: str) -> bool:
    """Whether a pattern of compressed-tensors names a linear module: by class, expression or name."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target in ("Linear", module)
