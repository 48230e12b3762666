"""Tiny random mixtures of experts, in folders as their families publish them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# Qwen3-30B-A3B's config.json and those of the other families, scaled down.
COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "transformers_version": "4.51.0",
    "use_cache": True,
}
_QWEN = {
    "decoder_sparse_step": 1,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "use_sliding_window": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": _QWEN
    | {"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "head_dim": 16}
    | {"norm_topk_prob": True, "rope_scaling": None},
    "qwen2_moe": _QWEN
    | {"architectures": ["Qwen2MoeForCausalLM"], "shared_expert_intermediate_size": 28}
    | {"norm_topk_prob": False},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 6},
    "olmoe": {"architectures": ["OlmoeForCausalLM"], "attention_bias": False, "clip_qkv": None}
    | {"norm_topk_prob": False, "num_experts": 6},
}


def write_mixture(
    folder: Path,
    model_type: str = "qwen3_moe",
    *,
    seed: int = 0,
    vocab: int = 37,
    layers: int = 2,
    tied: bool = False,
    eos: int = 2,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:
    """Write config.json and model.safetensors with random weights; `changes` are keys of config.json."""
    config = COMMON | FAMILIES[model_type] | changes
    config |= {"model_type": model_type, "vocab_size": vocab, "num_hidden_layers": layers}
    config |= {"tie_word_embeddings": tied, "eos_token_id": eos, "torch_dtype": str(dtype)[6:]}
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (
            torch.randn(shape, generator=generator) * 0.3 + (1.0 if name.endswith("norm.weight") else 0.0)
        ).to(dtype)
        for name, shape in _shapes(config)
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as published, written down apart from the code under test."""
    d, kind = config["hidden_size"], config["model_type"]
    head = config.get("head_dim", d // config["num_attention_heads"])
    q, k = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], d)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", q), ("k", k), ("v", k)):
            yield f"{prefix}self_attn.{name}_proj.weight", (rows, d)
            if kind == "qwen2_moe":
                yield f"{prefix}self_attn.{name}_proj.bias", (rows,)
        yield f"{prefix}self_attn.o_proj.weight", (d, q)
        if kind in ("qwen3_moe", "olmoe"):
            whole = kind == "olmoe"
            yield f"{prefix}self_attn.q_norm.weight", (q if whole else head,)
            yield f"{prefix}self_attn.k_norm.weight", (k if whole else head,)
        yield f"{prefix}input_layernorm.weight", (d,)
        yield f"{prefix}post_attention_layernorm.weight", (d,)
        yield from ((f"{prefix}{name}", shape) for name, shape in _feed_forward(config, layer))
    yield "model.norm.weight", (d,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], d)


def _feed_forward(config: dict[str, Any], layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, f, kind = config["hidden_size"], config["intermediate_size"], config["model_type"]
    if layer in config.get("mlp_only_layers", ()):
        yield from _gated("mlp.", d, f)
        return
    num_experts = config.get("num_experts", config.get("num_local_experts"))
    if kind == "mixtral":
        yield "block_sparse_moe.gate.weight", (num_experts, d)
        for expert in range(num_experts):
            for name, shape in (("w1", (f, d)), ("w2", (d, f)), ("w3", (f, d))):
                yield f"block_sparse_moe.experts.{expert}.{name}.weight", shape
        return
    yield "mlp.gate.weight", (num_experts, d)
    for expert in range(num_experts):
        yield from _gated(f"mlp.experts.{expert}.", d, config.get("moe_intermediate_size", f))
    if kind == "qwen2_moe":
        yield from _gated("mlp.shared_expert.", d, config["shared_expert_intermediate_size"])
        yield "mlp.shared_expert_gate.weight", (1, d)


def _gated(prefix: str, d: int, f: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
        yield f"{prefix}{name}_proj.weight", shape
