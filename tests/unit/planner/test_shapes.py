"""Sizes from config.json against transformers' own modules."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from mergeopd.errors import ModelError
from mergeopd.planner.shapes import ITEMSIZE, ModelShape

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 12,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32},
    "qwen2": {},
    "llama": {},
    "gemma2": {"head_dim": 32},
    "phi": {},
    "starcoder2": {},
    "olmo2": {},
    "qwen3_moe": EXPERTS | {"head_dim": 32, "num_experts": 8, "mlp_only_layers": [1]},
    "qwen2_moe": EXPERTS | {"num_experts": 8, "shared_expert_intermediate_size": 72},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": EXPERTS | LATENT | {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}
    | {"n_group": 2, "topk_group": 1, "num_key_value_heads": 4},
    "glm4_moe": EXPERTS | {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}
    | {"head_dim": 16, "use_qk_norm": True, "attention_bias": True},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
}  # fmt: skip


def write_config(folder: Path, model_type: str, **more: Any) -> Any:
    config = AutoConfig.for_model(model_type, **(SMALL | MODELS[model_type] | more))
    config.save_pretrained(folder)
    return config


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters(tmp_path: Path, model_type: str, tied: bool) -> None:
    config = write_config(tmp_path, model_type, tie_word_embeddings=tied)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    of_head = {"lm_head.bias"}  # Phi's; not worth a field
    expected = sum(p.numel() for name, p in model.named_parameters() if name not in of_head)
    assert ModelShape.read(tmp_path).parameters == expected


def test_published_sizes(tmp_path: Path) -> None:
    """Totals and active parameters as DeepSeek states them: 671 billion, 37 billion."""
    sizes = {
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "vocab_size": 129280,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "quantization_config": {"quant_method": "fp8"},
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", **sizes}))
    shape = ModelShape.read(tmp_path)
    assert shape.parameters / 1e9 == pytest.approx(671, abs=0.5)
    assert shape.active / 1e9 == pytest.approx(37, abs=0.5)
    assert shape.stored_bytes == 1.0
    assert shape.runs is not None
    assert "deepseek_v3" in shape.runs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["qwen3", "llama", "qwen2", "qwen3_moe", "qwen2_moe", "mixtral"])
def test_activations(tmp_path: Path, model_type: str, dtype: str) -> None:
    """Bytes that autograd saves for a forward pass, each storage once, without weights."""
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 640, "mlp_only_layers": []}
    config = write_config(tmp_path, model_type, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    ids, kept = torch.zeros(3, 40, dtype=torch.long), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=ids, use_cache=False)
    own = [t for key, t in kept.items() if key not in weights and t.is_floating_point() and len(t) > 1]
    saved = sum(tensor.untyped_storage().nbytes() for tensor in own)
    of_layer, of_end = ModelShape.read(tmp_path).saved_numbers(dtype)
    expected = ids.numel() * ITEMSIZE[dtype] * (3 * of_layer + of_end)
    assert expected == pytest.approx(saved, rel=0.01)


def test_operations(tmp_path: Path) -> None:
    """Matrix products of a forward pass, as torch counts them; the head's on 5 tokens."""
    config = write_config(tmp_path, "qwen3")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    flops = ModelShape.read(tmp_path).flops
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden = model.base_model(input_ids=torch.zeros(1, 64, dtype=torch.long)).last_hidden_state
        model.lm_head(hidden[:, :5])
    # Eager attention computes the whole square of positions; a plan counts the pairs that are read.
    expected = flops.per_token * 64 + flops.per_logits * 5 + flops.per_position * 64**2
    # What is left are the rotary frequencies times the positions.
    assert expected == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache(tmp_path: Path, dtype: str) -> None:
    config = write_config(tmp_path, "llama")
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    cache = DynamicCache(config=config)
    model(input_ids=torch.zeros(2, 7, dtype=torch.long), past_key_values=cache, use_cache=True)
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert ModelShape.read(tmp_path).kv_bytes(dtype) * 2 * 7 == cached


def test_experts_that_a_pass_reads(tmp_path: Path) -> None:
    """One token reads its own experts, many read all; between, what random routing reaches."""
    write_config(tmp_path, "olmoe")
    shape = ModelShape.read(tmp_path)
    assert shape.read_matrices(1) == pytest.approx(shape.active_matrices)
    assert shape.read_matrices(1000) == pytest.approx(shape.body_matrices)
    choices = [set(one) for one in combinations(range(8), 3)]
    reached = fmean(len(first | second) for first in choices for second in choices)
    of_expert = (shape.body_matrices - shape.active_matrices) / 5
    assert shape.read_matrices(2) == pytest.approx(shape.active_matrices + (reached - 3) * of_expert)


def test_missing_sizes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", "hidden_size": 64}))
    with pytest.raises(ModelError, match=r"config\.json: num_attention_heads is missing"):
        ModelShape.read(tmp_path)
