"""Tiny Qwen3 checkpoints that vLLM and SGLang can serve, and what transformers computes with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from small_experts import TOOLS  # puts tools/ on the path
from tiny_experts.tokens import END_ID, PAD_ID, pretrained, train_tokenizer
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

NUM_TOKENS, NUM_ROWS = 340, 352
CONTEXT_LENGTH = 1024


def write_engine_model(folder: Path, seed: int) -> Path:
    """Write a random model of 0.8M parameters with a tokenizer of 340 tokens; all seeds have the same tokenizer.

    The embedding has 12 rows more than there are tokens, as in released models. Weights are large enough for
    distributions far from uniform. Engines have kernels for few head sizes; 32 is the smallest of both.
    """
    config = Qwen3Config(
        vocab_size=NUM_ROWS,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    texts = (file.read_text() for file in sorted((TOOLS / "tiny_experts").glob("*.py")))
    pretrained(train_tokenizer(texts, NUM_TOKENS)).save_pretrained(folder)
    return folder


def reference_logits(folder: Path, ids: Sequence[int]) -> torch.Tensor:
    """Return the float32 logits [len(ids), vocabulary] that transformers computes for a sequence."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0]


def reference_logprobs(folder: Path, prompt: Sequence[int], response: Sequence[int]) -> np.ndarray:
    """Return the log-probs at temperature 1 [len(response)] of a response's tokens."""
    logits = reference_logits(folder, [*prompt, *response])[len(prompt) - 1 : -1]
    rows = torch.arange(len(response))
    return logits.log_softmax(-1)[rows, torch.tensor(list(response))].numpy()
