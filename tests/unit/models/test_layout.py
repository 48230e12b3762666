"""What a checkpoint must hold, worked out from config.json, is what transformers' own model holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergeopd.errors import ModelError
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.facts import ARCHITECTURES, ModelFacts
from mergeopd.models.layout import check_layout

SIZES = {
    "vocab_size": 33,
    "hidden_size": 24,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": EXPERTS | {"head_dim": 4},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 20, "mlp_only_layers": [0]},
    "qwen3_moe": EXPERTS | {"decoder_sparse_step": 2},
}
KEYS = (
    *("attention_bias", "attention_out_bias", "mlp_bias", "qkv_bias", "use_bias", "use_qkv_bias"),
    *("use_qk_norm", "qk_layernorm", "use_parallel_residual"),
)


def save(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Checkpoint:
    """A checkpoint of zeros: headers are all that is read."""
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        size = 2
        for n in shape:
            size *= n
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(offset))
    return Checkpoint.open(folder)


def transformers_shapes(
    folder: Path, model_type: str, *, fused: bool = False, **changes: Any
) -> dict[str, tuple[int, ...]]:
    """Writes config.json; the shapes of what transformers saves of such a model, or of its own parameters."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    config = AutoConfig.for_model(model_type, **(SIZES | OWN.get(model_type, {}) | changes))
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(folder)
    tensors = model.state_dict() if fused else revert_weight_conversion(model, model.state_dict())
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_has_the_tensors_that_transformers_saves(tmp_path: Path, model_type: str) -> None:
    shapes = transformers_shapes(tmp_path, model_type)
    config = json.loads((tmp_path / "config.json").read_text())
    check_layout(ModelFacts.read(tmp_path), save(tmp_path, shapes))
    for key in KEYS:
        if key in config and not (model_type == "phi" and key == "use_qk_norm"):
            changed = transformers_shapes(tmp_path, model_type, **{key: not config[key]})
            check_layout(ModelFacts.read(tmp_path), save(tmp_path, changed))
    fused = transformers_shapes(tmp_path, model_type, fused=True)
    check_layout(ModelFacts.read(tmp_path), save(tmp_path, fused))
    for name in [name for name in shapes if name.startswith("model.layers.1.") and ".act_fn." not in name][
        ::4
    ]:
        transformers_shapes(tmp_path, model_type)
        kept = {other: shape for other, shape in shapes.items() if other != name}
        if "_norm." not in name:
            with pytest.raises(ModelError, match=f"has no {name}"):
                check_layout(ModelFacts.read(tmp_path), save(tmp_path, kept))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "has no model.layers.2.self_attn.q_proj.weight"),
        (
            {"num_hidden_layers": 1},
            "has model.layers.1.self_attn.q_proj.weight, which the model does not have",
        ),
        (
            {"intermediate_size": 57},
            r"mlp.gate_proj.weight with shape \[56, 24\], the config says \[57, 24\]",
        ),
        ({"num_attention_heads": 4}, r"q_proj.weight with shape \[60, 24\], the config says \[40, 24\]"),
        ({"num_key_value_heads": 6}, r"k_proj.weight with shape \[20, 24\], the config says \[60, 24\]"),
        ({"attention_bias": True}, "has no model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_weights_and_config_that_disagree(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    checkpoint = save(tmp_path, transformers_shapes(tmp_path, "llama"))
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ModelError, match=message):
        check_layout(ModelFacts.read(tmp_path), checkpoint)


def test_tensors_that_transformers_ignores_are_ignored(tmp_path: Path) -> None:
    shapes = transformers_shapes(tmp_path, "llama")
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (5,) for i in range(2)}
    check_layout(ModelFacts.read(tmp_path), save(tmp_path, {**shapes, **extra}))
