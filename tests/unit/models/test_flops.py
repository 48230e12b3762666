"""Operations of a model's passes, against torch's own count of its matrix products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from mergeopd.models.flops import ModelFlops, TrainingFlops

T = 12
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, tie_word_embeddings=False),
        Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    ],
    ids=["llama", "qwen3"],
)
@pytest.mark.parametrize("passes", [1, 3], ids=["forward", "training"])
def test_they_are_those_that_torch_counts(tmp_path: Path, config: LlamaConfig, passes: int) -> None:
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.save_pretrained(tmp_path)
    ids = torch.arange(T).unsqueeze(0)
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids, use_cache=False).logits
        if passes == 3:
            logits.sum().backward()
    one = ModelFlops.read(tmp_path)
    # Eager attention computes what the mask drops, too.
    whole = one.per_position * (T * T - T * (T + 1) // 2)
    assert passes * (one.forward(T, T) + whole) == counter.get_total_flops()


def test_a_response_costs_its_generation_its_teachers_and_three_passes() -> None:
    student, teacher = ModelFlops(100, 10, 1000), ModelFlops(500, 20, 3000)
    flops = TrainingFlops(student, {"math": teacher})
    by_hand = 100 * 5 + 10 * 15 + 1000 * 3  # 5 tokens, 1 + ... + 5 positions, 3 rows of logits
    assert flops.of_generation(2, 3, None) == {"rollout": by_hand}
    assert flops.of_generation(2, 3, "math") == {"text": 500 * 5 + 20 * 15 + 3000 * 3}
    expected = {"update": 3 * by_hand, "teachers": 500 * 5 + 20 * 15 + 3000 * 3}
    assert flops.of_training(5, 3, ["math"], prior_policy=False) == expected
    assert flops.of_training(5, 3, [], prior_policy=True)["update"] == 4 * by_hand
