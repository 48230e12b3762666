"""Folders that other libraries quantised give the logits that transformers gives, from the bytes in the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergeopd.errors import ModelError
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.facts import ModelFacts, head_tensor
from mergeopd.models.flops import ModelFlops
from mergeopd.models.layout import check_layout
from mergeopd.models.static_merges import why_not
from mergeopd.models.stored import num_weights
from mergeopd.teacher.local import TeacherSource, TeacherStore
from mergeopd.teacher.protocol import TeacherSequence

pytest.importorskip("compressed_tensors")
pytest.importorskip("torchao")
from quantised import SCHEMES, logits_of, save_compressed, save_fp8_blocks, save_torchao, write_folder

CPU = torch.device("cpu")
IDS = [1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15, 16]


@pytest.fixture(scope="module")
def plain(make_model: Callable[..., Path]) -> Path:
    return make_model("plain", tied=False, seed=3, spread=0.4)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def own_logits(folder: Path) -> tuple[torch.Tensor, set[str], int]:
    """Logits of all but the first ids, the classes of the body's weights, and the bytes read for them."""
    facts, checkpoint = ModelFacts.read(folder, "readable"), Checkpoint.open(folder)
    check_layout(facts, checkpoint, head_tensor(facts, checkpoint))
    store = TeacherStore({"t": TeacherSource(folder, "float32", 37)}, CPU)
    with store.open("t") as session:
        [(_, hidden)] = session.hidden([TeacherSequence(IDS[:1], IDS[1:])], 100)
        classes = {type(parameter.data).__name__ for parameter in session.body.parameters()}
        num_bytes = store.bytes_read("t")
        return hidden @ session.head.weight.T, classes, num_bytes


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors(plain: Path, tmp_path: Path, name: str) -> None:
    from transformers import CompressedTensorsConfig

    save_compressed(plain, tmp_path, name)
    logits, classes, num_bytes = own_logits(tmp_path)
    expected = logits_of(tmp_path, IDS, quantization_config=CompressedTensorsConfig(dequantize=True))[:-1]
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    packed = {"int8 by channel": "Int8Tensor", "fp8 by channel": "Float8Tensor"}.get(name, "Tensor")
    assert packed in classes
    of_file = Checkpoint.open(tmp_path)
    head = of_file.tensors["lm_head.weight"].num_bytes
    unread = sum(t.num_bytes for n, t in of_file.tensors.items() if n.endswith("input_scale"))
    assert num_bytes == of_file.file_bytes - head - unread
    assert num_weights(ModelFacts.read(tmp_path, "readable"), of_file) == Checkpoint.open(plain).num_weights
    assert ModelFlops.read(tmp_path) == ModelFlops.read(plain)


@pytest.mark.parametrize("block", [(16, 16), (24, 20)])
def test_fp8_blocks(plain: Path, tmp_path: Path, block: tuple[int, int]) -> None:
    save_fp8_blocks(plain, tmp_path, block)
    logits, _, _ = own_logits(tmp_path)
    # The definition: every weight times the scale of its block. transformers needs whole blocks.
    tensors = load_file(tmp_path / "model.safetensors")
    decoded = dict(tensors)
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        weight, scale = tensors[name.removesuffix("_scale_inv")].float(), decoded.pop(name)
        for i in range(weight.shape[0]):
            for j in range(weight.shape[1]):
                weight[i, j] *= scale[i // block[0], j // block[1]]
        decoded[name.removesuffix("_scale_inv")] = weight
    reference = tmp_path / "reference"
    write_folder(plain, reference, decoded, None)
    assert torch.equal(logits, own_logits(reference)[0])
    expected = logits_of(reference, IDS)[:-1]
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao(plain: Path, tmp_path: Path, name: str) -> None:
    import torchao.quantization

    save_torchao(plain, tmp_path, getattr(torchao.quantization, name)())
    logits, classes, _ = own_logits(tmp_path)
    assert torch.equal(logits, logits_of(tmp_path, IDS)[:-1])
    assert classes == {"Tensor", name.removesuffix("WeightOnlyConfig") + "Tensor"}


def broken(plain: Path, folder: Path, **changes: Any) -> Path:
    """An int8 folder with other tensors; None removes one."""
    save_compressed(plain, folder, "int8 by channel")
    tensors = load_file(folder / "model.safetensors")
    for end, change in changes.items():
        name = next(name for name in tensors if name.endswith(end))
        value = tensors.pop(name)
        if change is not None:
            tensors[name] = change(value).contiguous()
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_proj.weight_scale": None}, "elements of type I8 and no scales"),
        ({"q_proj.weight_scale": lambda s: s[:5]}, "has 5 scales, its format int-quantized needs 32"),
        ({"q_proj.weight": lambda w: w.float()}, "elements of type F32, the format int-quantized has I8"),
        ({"q_proj.weight": None}, "its 'weight' is missing"),
        ({"lm_head.weight": lambda w: w.to(torch.int8)}, "'lm_head.weight' is quantised, and embedding"),
        ({"input_layernorm.weight": lambda w: w.to(torch.int8)}, "elements of type I8 and no scales"),
    ],
)
def test_damaged_folders_are_refused(
    plain: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = broken(plain, tmp_path, **changes)
    facts, checkpoint = ModelFacts.read(folder, "readable"), Checkpoint.open(folder)
    with pytest.raises(ModelError, match=message):
        check_layout(facts, checkpoint, head_tensor(facts, checkpoint))


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 8}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised as gptq, which has no loader here; read are comp"),
        ({"quant_method": "mxfp4"}, r"Mxfp4Config\(dequantize=True\)"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": GROUP}, "format": "marlin-24"},
            "the format marlin-24 of compressed-tensors has no loader",
        ),
        (
            {"quant_method": "compressed-tensors", "quantization_status": "frozen"},
            "are not compressed",
        ),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {}}}},
            "transform_config of compressed-tensors is not supported",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size must be two positive"),
    ],
)
def test_formats_without_a_loader_are_refused(
    plain: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    config = json.loads((plain / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(ModelError, match=message):
        ModelFacts.read(tmp_path, "readable")
    with pytest.raises(ModelError, match="only teachers are read from such folders"):
        ModelFacts.read(tmp_path)
    assert ModelFacts.read(tmp_path, "any").vocab_rows == 37
    assert why_not(plain, [tmp_path]) == f"the weights of {tmp_path.name} are quantised"


def test_a_missing_package_is_named_with_its_command(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_compressed(plain, tmp_path, "int4 packed")
    monkeypatch.setattr("mergeopd.models.quantization.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"compressed-tensors: pip install 'mergeopd\[quantize\]'"):
        ModelFacts.read(tmp_path, "readable")
