"""Whole recipes over byte-level tokenizers: a teacher may cut the same text otherwise than the student."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM

TEMPLATE = "{{ messages[0].content }}"
END = "<end>"


def write_byte_tokenizer(folder: Path, merges: Sequence[tuple[str, str]], *, turned: bool = False) -> int:
    """256 bytes, merges, an end token; `turned` numbers them the other way round. Returns the vocabulary's size."""
    written = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    vocab = {token: i for i, token in enumerate(reversed(written) if turned else written)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocab) + 1


def write_model(folder: Path, *, seed: int, vocab: int, hidden: int) -> None:
    """A random StableLM: its LayerNorm computes in float64 where the weights are."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "stablelm",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=hidden // 16,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.3,
        eos_token_id=vocab - 1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def write_byte_job(
    folder: Path, recipe: Mapping[str, object], *, merges: Sequence[tuple[str, str]], turned: bool
) -> Path:
    """Student `base` without merges but `ab`; teacher `other` with `merges`; StableLM in float64."""
    sizes = {
        "base": write_byte_tokenizer(folder / "base", [("a", "b")]),
        "other": write_byte_tokenizer(folder / "other", merges, turned=turned),
    }
    for seed, (name, size) in enumerate(sizes.items(), start=1):
        hidden = 32 if name == "base" else 48
        write_model(folder / name, seed=seed, vocab=size, hidden=hidden)
    (folder / "other.yaml").write_text(json.dumps({"card": 1, "name": "other", "model": "other"}))
    rows = [{"prompt": p, "answer": "c"} for p in ("ab", "cab", "x y")]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    document = {
        "recipe": 1,
        "name": "job",
        "threads": 1,
        "student": {"model": "base", "dtype": "float64", "micro_batch_tokens": 24},
        "prompts": [{"source": "p.jsonl", "domain": "d", "teachers": {"other": 0.7}}],
        "rollout": {"max_new_tokens": 6},
        "optimizer": {"lr": 0.01},
        "output": "run",
        "text_cache": "cache",
        **recipe,
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(document))
    return path
