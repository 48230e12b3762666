from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SIZES: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 0,
}
EXPERT = {
    "model_type": "qwen3_next",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
}


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., Path]:
    """Writes configs of an 8B student and teacher and of a mixture, without weights, and a recipe."""

    def write(**changes: Any) -> Path:
        for name, more in (("student", {}), ("dense", {}), ("mixture", EXPERT)):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "config.json").write_text(json.dumps(SIZES | more))
        for name in ("dense", "mixture"):
            card = {"card": 1, "name": name, "model": name, "domains": [name]}
            (tmp_path / f"{name}.yaml").write_text(json.dumps(card))
        recipe = {
            "recipe": 1,
            "name": "planned",
            "student": {"model": "student", "dtype": "bfloat16", "micro_batch_tokens": 8192}
            | {"backend": "megatron", "parallel": {"tensor": 4, "pipeline": 2}},
            "teachers": {"dense": {"card": "dense.yaml", "dtype": "bfloat16"}},
            "prompts": [{"source": "absent.jsonl", "domain": "dense"}],
            "rollout": {"max_new_tokens": 1024, "batch_size": 64},
            "phases": [{"name": "merge", "updates": 100, "loss": "reverse_kl", "prompts_per_round": 256}],
            "output": "run",
        } | changes
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(recipe))
        return path

    return write
