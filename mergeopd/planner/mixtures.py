"""Parameters of mixtures of experts and of latent attention, from config.json.

mergeopd loads some of these models (`models/facts.py`); a plan counts the others, too, as served teachers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeopd.errors import ModelError
from mergeopd.models.facts import positive_int


@dataclass(frozen=True, slots=True)
class Counts:
    """Parameters of all layers: matrices, those that one token uses, vectors; sizes that one token uses.

    `kv_numbers` is what a layer caches for one token where that is not keys and values of all heads.
    """

    matrices: int
    active: int
    vectors: int
    ffn: int
    kv_numbers: int = 0
    layer: int = 0
    """Parameters of the largest layer; 0: that of the mean."""
    experts: int = 0
    per_token: int = 0
    """Experts of a layer, and those that one token uses; 0 for a dense model."""
    shared: int = 0
    """Size of the expert that all tokens use."""


MIXTURES: Mapping[str, str] = {
    "num_experts": "Qwen's and others' mixtures",
    "n_routed_experts": "DeepSeek's and GLM's",
    "num_local_experts": "Mixtral, gpt-oss and others",
}
"""Keys of config.json that hold the number of experts of a layer."""


def layer_counts(path: Path, config: Mapping[str, Any]) -> Counts:
    """Count the parameters of the layers and the last norm. Raises ModelError for missing sizes."""
    data = dict(config)
    layers, hidden = (positive_int(path, data, key) for key in ("num_hidden_layers", "hidden_size"))
    attention, kv_numbers, vectors = _attention(path, data, hidden)
    gates = 3
    dense_ffn = data.get("intermediate_size")
    key = next((key for key in MIXTURES if data.get(key)), None)
    if key is None:
        ffn = positive_int(path, data, "intermediate_size")
        matrices = layers * (attention + gates * hidden * ffn)
        return Counts(matrices, matrices, layers * (vectors + 2 * hidden) + hidden, ffn, kv_numbers)
    experts = positive_int(path, data, key)
    per_token = data.get("num_experts_per_tok") or data.get("experts_per_token")
    if not isinstance(per_token, int) or not 1 <= per_token <= experts:
        raise ModelError(f"{path}: num_experts_per_tok must be from 1 to {experts}, not {per_token!r}")
    own = data.get("moe_intermediate_size") or dense_ffn
    if not isinstance(own, int):
        raise ModelError(f"{path}: moe_intermediate_size is missing; fetch the model's own config.json")
    shared = data.get("shared_expert_intermediate_size") or own * int(data.get("n_shared_experts") or 0)
    gate = hidden if data.get("shared_expert_intermediate_size") else 0
    num_dense = _num_dense(data, layers)
    num_mixed = layers - num_dense
    one = gates * hidden * own
    router, always = hidden * experts, gates * hidden * shared + gate
    dense = num_dense * gates * hidden * int(dense_ffn or 0)
    matrices = layers * attention + dense + num_mixed * (experts * one + router + always)
    active = layers * attention + dense + num_mixed * (per_token * one + router + always)
    extra = _expert_vectors(data, hidden, own, experts)
    total = layers * (vectors + 2 * hidden) + num_mixed * extra + hidden
    return Counts(
        matrices,
        active,
        total,
        per_token * own + int(shared),
        kv_numbers,
        experts=experts,
        per_token=per_token,
        shared=int(shared),
    )


def _attention(path: Path, config: dict[str, Any], hidden: int) -> tuple[int, int, int]:
    """Return the matrices of a layer's attention, the numbers that it caches, and its vectors."""
    heads = positive_int(path, config, "num_attention_heads")
    if latent := config.get("kv_lora_rank"):
        rope, plain, value = (
            positive_int(path, config, key) for key in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        )
        query = config.get("q_lora_rank")
        per_head = plain + rope
        of_query = hidden * query + query * heads * per_head if query else hidden * heads * per_head
        matrices = of_query + hidden * (latent + rope) + latent * heads * (plain + value)
        matrices += heads * value * hidden
        return matrices, latent + rope, latent + int(query or 0)
    size, groups = config["head_dim"], config["num_key_value_heads"]
    matrices = hidden * size * (2 * heads + 2 * groups)
    biased = config.get("attention_bias", config.get("model_type") == "qwen2_moe")
    of_output = hidden if config.get("attention_bias") and config.get("model_type") == "gpt_oss" else 0
    vectors = size * (heads + 2 * groups) + of_output if biased else 0
    has_norms = config.get("use_qk_norm") or config.get("model_type") in ("qwen3_moe", "qwen3_next")
    vectors += 2 * size if has_norms else 0
    vectors += heads if config.get("model_type") == "gpt_oss" else 0  # attention sinks
    return matrices, 0, vectors


def _num_dense(config: Mapping[str, Any], layers: int) -> int:
    """Return how many layers have one feed-forward network instead of experts."""
    first = config.get("first_k_dense_replace")
    if isinstance(first, int):
        return min(first, layers)
    only = config.get("mlp_only_layers") or ()
    step = config.get("decoder_sparse_step") or 1
    return sum(layer in only or (layer + 1) % step != 0 for layer in range(layers))


def _expert_vectors(config: Mapping[str, Any], hidden: int, own: int, experts: int) -> int:
    """Return the vectors of a layer's experts: biases, and the router's correction."""
    if config.get("model_type") == "gpt_oss":
        return experts * (2 * own + hidden) + experts
    # Of the models with `n_routed_experts`, transformers keeps the router's correction as a buffer.
    return 0
