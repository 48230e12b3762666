"""Decode the weights of a folder: from one tensor each, or from quantised data and scales."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mergeopd.models.quantization import Encoding
from mergeopd.models.quiet import without_warnings
from mergeopd.models.stored import StoredWeight


def decoded(
    weights: Mapping[str, StoredWeight],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    copy: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Yield each of the `weights` as soon as its last tensor has come; see `decode`.

    `tensors` are all of theirs, by name, in any order. With `copy`, weights that stay as they are stored are
    no views of them.
    """
    owner = {tensor: name for name, stored in weights.items() for tensor in stored.tensors.values()}
    waiting: dict[str, dict[str, Tensor]] = {}
    for tensor, values in tensors:
        name = owner[tensor]
        stored, parts = weights[name], waiting.setdefault(name, {})
        parts[tensor] = values
        if len(parts) == len(stored.tensors):
            del waiting[name]
            is_kept = stored.encoding is not None and stored.encoding.packed is not None
            by_role = {role: parts[own] for role, own in stored.tensors.items()}
            if copy and is_kept:
                by_role = {role: part.clone() for role, part in by_role.items()}
            yield name, decode(stored, by_role, dtype, device)


def decode(
    stored: StoredWeight, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return a weight from its tensors by role, `[*stored.shape]` in `dtype` on `device`.

    Weights of 8 bits with a scale for each row stay as they are stored: a tensor of torchao, which linear
    layers take in place of a plain one. Others are decoded.
    """
    encoding = stored.encoding
    if encoding is None:
        [values] = tensors.values()
        return values.to(device=device, dtype=dtype)
    local = {role: values.to(device) for role, values in tensors.items()}
    if encoding.packed is not None:
        return _packed(encoding, stored, local, dtype)
    if encoding.format == "fp8":
        return _of_blocks(local["weight"], local["weight_scale_inv"], encoding.settings["block"], dtype)
    return _decompressed(encoding, local).to(dtype)


def plain(values: Tensor) -> Tensor:
    """Decode a weight that stays as it is stored, for products that take plain matrices only."""
    return values.dequantize() if is_packed(values) else values


def is_packed(values: Tensor) -> bool:
    """Whether a weight stays in memory as it is stored."""
    return hasattr(values, "qdata")


def torchao_classes() -> dict[str, Any]:
    """Return torchao's tensor classes by name."""
    with without_warnings():
        from torchao.quantization import Float8Tensor, Int8Tensor
    return {"Int8Tensor": Int8Tensor, "Float8Tensor": Float8Tensor}


def _packed(
    encoding: Encoding, stored: StoredWeight, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Tensor:
    data, scale, *zero_point = (tensors[role] for role in encoding.roles)
    rows, columns = stored.shape
    block_size = encoding.settings.get("block_size") or [1, columns]
    scale = scale.to(dtype).reshape(rows // block_size[0], columns // block_size[1])
    more = {"zero_point": zero_point[0]} if zero_point else {}
    cls = torchao_classes()[encoding.packed or ""]
    weight: Tensor = cls(data, scale, block_size=list(block_size), dtype=dtype, **more)
    return weight


def _of_blocks(data: Tensor, scale: Tensor, block: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
    """Multiply every block of a weight `[rows, columns]` by its scale; the last blocks may be smaller."""
    wide = data.to(torch.float32)
    if block is None:
        return (wide * scale.to(torch.float32)).to(dtype)
    (rows, columns), height = data.shape, block[0]
    by_column = scale.to(torch.float32).repeat_interleave(block[1], 1)[:, :columns]
    full = rows // height
    wide[: full * height].view(full, height, columns).mul_(by_column[:full, None])
    wide[full * height :].mul_(by_column[full:])
    return wide.to(dtype)


def _decompressed(encoding: Encoding, tensors: Mapping[str, Tensor]) -> Tensor:
    with without_warnings():
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme
    scheme = QuantizationScheme.model_validate(dict(encoding.settings))
    compressor = BaseCompressor.get_value_from_registry(encoding.format)
    weight: Tensor = compressor.decompress(dict(tensors), scheme)["weight"]
    return weight
