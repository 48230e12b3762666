"""From a seed to a folder with the foreign expert."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from tiny_experts.llama.settings import DOMAIN, LlamaSettings
from tiny_experts.llama.tokens import BEGIN_ID, END_ID, encode, pretrained, train_tokenizer
from tiny_experts.parallel import Advance
from tiny_experts.settings import Settings
from tiny_experts.tasks import splits
from tiny_experts.train import Learner, accuracy, train_expert


def new_model(llama: LlamaSettings, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights and a head of its own; its generation config ends at the end token."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=llama.num_tokens,
        hidden_size=llama.hidden_size,
        intermediate_size=llama.intermediate_size,
        num_hidden_layers=llama.num_layers,
        num_attention_heads=llama.num_heads,
        num_key_value_heads=llama.num_key_value_heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=BEGIN_ID,
        eos_token_id=END_ID,
    )
    return LlamaForCausalLM(config)


def build(folder: Path, settings: Settings, llama: LlamaSettings, seed: int, advance: Advance) -> float:
    """Writes model and tokenizer into `folder`; returns the accuracy on the evaluation prompts.

    It learns from the rows that its sibling of the same domain learns from, and is measured on the same.
    """
    transformers_logging.disable_progress_bar()
    examples = splits(DOMAIN, settings.rows, seed)
    # Prompts by their words: only neighbours in answers are worth a token of their own.
    texts = (text for row in examples["train"] for text in (*row.prompt.split(), row.answer))
    tokenizer = train_tokenizer(texts, llama.num_tokens)
    rows = {split: encode(tokenizer, examples[split]) for split in ("train", "check", "eval")}
    learner = Learner(
        new_model(llama, seed),
        {DOMAIN: rows["train"]},
        {DOMAIN: rows["check"]},
        seed=f"{seed}/llama",
        num_tokens=llama.num_tokens,
    )
    expert = train_expert(learner, DOMAIN, llama.training, advance)
    expert.save_pretrained(folder)
    pretrained(tokenizer).save_pretrained(folder)
    return accuracy(expert, rows["eval"], num_tokens=llama.num_tokens)
