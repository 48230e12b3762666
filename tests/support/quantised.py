"""Quantised folders as their own libraries save them, and what transformers computes with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, PreTrainedModel

BITS_8 = {"num_bits": 8, "symmetric": True, "dynamic": False}
BITS_4 = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False}
# Settings of weights, and of activations, as published configurations have them.
SCHEMES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "int8 by channel": (
        {**BITS_8, "type": "int", "strategy": "channel"},
        {**BITS_8, "type": "int", "strategy": "token", "dynamic": True},
    ),
    "fp8 by channel": (
        {**BITS_8, "type": "float", "strategy": "channel"},
        {**BITS_8, "type": "float", "strategy": "token", "dynamic": True},
    ),
    "fp8 by tensor": (
        {**BITS_8, "type": "float", "strategy": "tensor"},
        {**BITS_8, "type": "float", "strategy": "tensor"},
    ),
    "fp8 by block": (
        {**BITS_8, "type": "float", "strategy": "block", "block_structure": [24, 16]},
        {**BITS_8, "type": "float", "strategy": "group", "group_size": 16, "dynamic": True},
    ),
    "int8 packed": ({**BITS_8, "type": "int", "strategy": "channel"}, None),
    "int4 packed": ({**BITS_4, "strategy": "group", "group_size": 16}, None),
    "int4 packed, asymmetric": ({**BITS_4, "symmetric": False, "strategy": "group", "group_size": 16}, None),
    "nvfp4": ({**BITS_4, "type": "float", "strategy": "tensor_group", "group_size": 16}, None),
    "mxfp4": ({**BITS_4, "type": "float", "strategy": "group", "group_size": 32}, None),
}


def save_compressed(source: Path, folder: Path, name: str) -> None:
    """Quantise a folder with compressed-tensors, to the nearest values of a scheme of `SCHEMES`."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
    )

    model = AutoModelForCausalLM.from_pretrained(source)
    weights, activations = SCHEMES[name]
    scheme = {"targets": ["Linear"], "weights": _args(name, weights), "input_activations": activations}
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head"], quantization_status="initialized"
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            _calibrate(module)
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def _args(name: str, weights: dict[str, Any]) -> dict[str, Any]:
    of_scales = {"nvfp4": {"scale_dtype": torch.float8_e4m3fn}, "mxfp4": {"scale_dtype": torch.uint8}}
    return weights | of_scales.get(name, {})


@torch.no_grad()
def _calibrate(module: Any) -> None:
    """Set scales and zero points from the extremes of a weight."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args, weight, scales = module.quantization_scheme.weights, module.weight, {}
    group = args.group_size
    if args.strategy == "tensor":
        low, high = weight.amin().reshape(1), weight.amax().reshape(1)
    elif args.strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    elif args.strategy == "block":
        blocks = _blocks(weight, args.block_structure)
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        grouped = weight.unflatten(1, (-1, group))
        low, high = grouped.amin(2), grouped.amax(2)
    if hasattr(module, "weight_global_scale"):
        module.weight_global_scale.copy_(generate_gparam(weight.amin(), weight.amax()).reshape(1))
        scales["global_scale"] = module.weight_global_scale
    scale, zero_point = calculate_qparams(low, high, args, **scales)
    module.weight_scale.copy_(scale.reshape(module.weight_scale.shape))
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.copy_(zero_point.reshape(module.weight_zero_point.shape))


def _blocks(weight: Tensor, block: Any) -> Tensor:
    rows, columns = block
    padded = pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
    return padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))


def save_fp8_blocks(source: Path, folder: Path, block: tuple[int, int]) -> None:
    """Write the layout of published fp8 models: `weight` and `weight_scale_inv`, a scale for each block."""
    tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        tensors[name] = weight
        if name.endswith("_proj.weight"):
            blocks = _blocks(weight, block)
            scale = blocks.abs().amax((1, 3)) / 448
            whole = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1)
            kept = whole[: weight.shape[0], : weight.shape[1]].contiguous()
            tensors[name] = kept.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    write_folder(source, folder, tensors, settings)


def write_folder(source: Path, folder: Path, tensors: dict[str, Tensor], quantization: Any) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def save_torchao(source: Path, folder: Path, settings: Any) -> None:
    """Quantise a folder with torchao, through transformers."""
    from transformers import TorchAoConfig

    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=TorchAoConfig(settings))
    model.save_pretrained(folder)


def logits_of(model: PreTrainedModel | Path, ids: list[int], **settings: Any) -> Tensor:
    """Return `[len(ids), V]` as transformers computes them in float32."""
    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **settings)
    with torch.no_grad():
        logits: Tensor = model.eval()(torch.tensor([ids])).logits[0]
    return logits
