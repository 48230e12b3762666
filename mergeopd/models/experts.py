"""Experts of a mixture: how a module's parameters are made of a folder's tensors, by names only. No torch.

In transformers a layer's experts are two parameters, `gate_up_proj [E, 2 f, d]` and `down_proj [E, d, f]`.
Published folders have a matrix per expert, and sometimes other names for the rest. Everything else that
this package does not list here has the same name in module and folder. A folder that was saved with the
module's own names is read as well; what is written has the published ones.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Sizes = tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A folder's tensor and its place in a parameter: all of it, or consecutive rows of one expert's matrix.

    With an `expert`, the place is `parameter[expert, rows(n)]` for a tensor of `n` rows. The parts of one
    parameter have equal shapes.
    """

    tensor: str
    expert: int | None = None
    piece: int = 0

    def rows(self, num_rows: int) -> slice:
        """Return the rows of the expert's matrix that a tensor of `num_rows` rows fills."""
        return slice(self.piece * num_rows, (self.piece + 1) * num_rows)


@dataclass(frozen=True, slots=True)
class _Names:
    """Published names: `block` for the module's `mlp`, and the matrices of each parameter of the experts."""

    block: str
    matrices: Mapping[str, tuple[str, ...]]


_QWEN = _Names("mlp", {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)})
_MIXTRAL = _Names("block_sparse_moe", {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)})
_FAMILIES: Mapping[str, _Names] = MappingProxyType(
    {**dict.fromkeys(("olmoe", "qwen2_moe", "qwen3_moe"), _QWEN), "mixtral": _MIXTRAL}
)
_MODULE_BLOCK = "mlp"
_FOLDER_NAME = re.compile(r"(?P<layer>.*\.layers\.\d+)\.(?P<block>\w+)\.(?P<rest>.+)")
_MATRIX = re.compile(r"experts\.(?P<expert>\d+)\.(?P<matrix>\w+)\.weight")


def part_of(model_type: str, tensor: str) -> tuple[str, Part]:
    """Return the parameter to which a folder's tensor belongs, and its place there."""
    names, match = _FAMILIES.get(model_type), _FOLDER_NAME.fullmatch(tensor)
    if names is None or match is None or match["block"] != names.block:
        return tensor, Part(tensor)
    prefix, rest = f"{match['layer']}.{_MODULE_BLOCK}", match["rest"]
    matrix = _MATRIX.fullmatch(rest)
    if matrix is None:
        return f"{prefix}.{rest}", Part(tensor)
    for fused, pieces in names.matrices.items():
        if matrix["matrix"] in pieces:
            part = Part(tensor, int(matrix["expert"]), pieces.index(matrix["matrix"]))
            return f"{prefix}.experts.{fused}", part
    return f"{prefix}.{rest}", Part(tensor)


def is_of_expert(model_type: str, tensor: str) -> bool:
    """Whether a folder's tensor is a matrix of one of a layer's experts, or of all of them."""
    parameter, part = part_of(model_type, tensor)
    return part.expert is not None or len(parts_of(model_type, parameter, 2)) > 1


def parts_of(model_type: str, parameter: str, num_experts: int) -> tuple[Part, ...]:
    """Return the tensors, under their published names, of which a parameter is made: by expert and rows."""
    parts = (part for e in range(num_experts) for part in expert_parts(model_type, parameter, e))
    return tuple(parts) or (Part(published_name(model_type, parameter)),)


def expert_parts(model_type: str, parameter: str, expert: int) -> tuple[Part, ...]:
    """Return the tensors of one expert in a parameter, by rows; empty if it has no experts."""
    names, match = _FAMILIES.get(model_type), _FOLDER_NAME.fullmatch(published_name(model_type, parameter))
    if names is None or match is None or not match["rest"].startswith("experts."):
        return ()
    prefix = f"{match['layer']}.{names.block}.experts.{expert}"
    pieces = names.matrices.get(match["rest"].removeprefix("experts."), ())
    return tuple(Part(f"{prefix}.{matrix}.weight", expert, piece) for piece, matrix in enumerate(pieces))


def published_name(model_type: str, parameter: str) -> str:
    """Return the name under which a parameter is published that is one tensor."""
    names, match = _FAMILIES.get(model_type), _FOLDER_NAME.fullmatch(parameter)
    if names is None or match is None or match["block"] != _MODULE_BLOCK:
        return parameter
    return f"{match['layer']}.{names.block}.{match['rest']}"


def published_shapes(
    model_type: str, shapes: Mapping[str, Sizes], given: Container[str] = ()
) -> dict[str, Sizes]:
    """Return shapes by published names, from those of parameters; names that are `given` stay as they are.

    A size that is None is unknown; the number of experts must be known.
    """
    published: dict[str, Sizes] = {}
    for name, shape in shapes.items():
        parts = parts_of(model_type, name, shape[0] or 0) if shape and name not in given else (Part(name),)
        num_pieces = 1 + parts[-1].piece
        for part in parts:
            if part.expert is None:
                published[part.tensor] = shape
            else:
                _, rows, columns = shape
                published[part.tensor] = (None if rows is None else rows // num_pieces, columns)
    return published


def published(model_type: str, parameter: str, values: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a parameter's tensors by their published names; views of `values`."""
    parts = parts_of(model_type, parameter, len(values) if values.ndim else 0)
    num_pieces = 1 + parts[-1].piece
    for part in parts:
        if part.expert is None:
            yield part.tensor, values
        else:
            yield part.tensor, values[part.expert, part.rows(values.shape[1] // num_pieces)]


def has_experts(model_type: str, config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer has experts; the others have one feed-forward network. `config` is config.json's."""
    if model_type not in _FAMILIES:
        return False
    if layer in (config.get("mlp_only_layers") or ()):
        return False
    return (layer + 1) % (config.get("decoder_sparse_step") or 1) == 0
