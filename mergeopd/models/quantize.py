"""Write a copy of a model folder whose linear layers have 8 bits per weight and a scale for each row.

The matrices of experts count as linear layers, if each is a tensor of its own; routers stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mergeopd.models.causal import build_skeleton, parameter_parts
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.decode import torchao_classes
from mergeopd.models.facts import ModelFacts
from mergeopd.models.weight_files import write_model

Format = Literal["int8", "float8"]
_MAX_FILE_BYTES = 4 << 30


def write_quantized(
    source: Path,
    folder: Path,
    form: Format,
    device: torch.device,
    on_progress: Callable[[int, int], None],
) -> None:
    """Quantise the model in `source` into an existing folder, one tensor in memory at a time.

    The result is a compressed-tensors folder. Embedding, norms, biases and the prediction head are copied.
    `on_progress` gets the bytes read so far and those of all tensors. Raises ModelError for weights that do
    not fit config.json.
    """
    facts, checkpoint = ModelFacts.read(source), Checkpoint.open(source)
    model = build_skeleton(source, torch.device("meta"), torch.float32)
    linear = {id(module.weight) for module in model.base_model.modules() if isinstance(module, nn.Linear)}
    of_linear = {name for name, parameter in model.named_parameters() if id(parameter) in linear}
    names = {
        part.tensor
        for name, parts in parameter_parts(facts, checkpoint).items()
        for part in parts
        if name in of_linear or part.expert is not None
    }
    tensors = _quantized(checkpoint, names, form, device, on_progress)
    write_model(tensors, source, folder, _MAX_FILE_BYTES, _config(form))


def _quantized(
    checkpoint: Checkpoint,
    linear: Collection[str],
    form: Format,
    device: torch.device,
    on_progress: Callable[[int, int], None],
) -> Iterator[tuple[str, Tensor]]:
    cls = torchao_classes()["Int8Tensor" if form == "int8" else "Float8Tensor"]
    from torchao.quantization import PerRow

    done, total = 0, sum(info.num_bytes for info in checkpoint.tensors.values())
    for name, values in checkpoint.read_all(checkpoint.tensors):
        on_progress(done, total)
        if name in linear:
            packed = cls.from_hp(values.to(device, torch.float32), granularity=PerRow())
            yield name, packed.qdata
            yield f"{name}_scale", packed.scale
        else:
            yield name, values
        done += values.nbytes
    on_progress(done, total)


def _config(form: Format) -> dict[str, Any]:
    weights = {"num_bits": 8, "strategy": "channel", "symmetric": True, "dynamic": False}
    kind = {"int8": "int", "float8": "float"}[form]
    group = {"targets": ["Linear"], "weights": {**weights, "type": kind}, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "format": f"{kind}-quantized"}},
        "ignore": ["lm_head"],
    }
