"""The job of bench_step.py: models, prompts, recipe."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path


def write_job(arguments: argparse.Namespace) -> None:
    """Write student, teacher, prompts, recipe. One round uses every prompt, so all steps have the same."""
    folder, vocab = arguments.folder, arguments.vocab
    for seed, name in enumerate(("student", "teacher")):
        write_model(folder / name, arguments, seed)
    rng = random.Random(0)
    spread = arguments.prompt // 8
    lengths = [
        rng.randint(arguments.prompt - spread, arguments.prompt + spread) for _ in range(arguments.batch)
    ]
    prompts = [" ".join(f"w{rng.randrange(1, vocab)}" for _ in range(length)) for length in lengths]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in prompts))
    (folder / "teacher.yaml").write_text(json.dumps({"card": 1, "name": "teacher", "model": "teacher"}))
    recipe = {
        "recipe": 1,
        "name": "step",
        "threads": 1,
        "student": {"model": "student"},
        "teachers": {"teacher": "teacher.yaml"},
        "prompts": [{"source": "prompts.jsonl", "domain": "words", "teachers": "teacher"}],
        "rollout": {"max_new_tokens": arguments.new_tokens},
        "phases": [
            {
                "name": "merge",
                "updates": arguments.steps + 1,
                "loss": "reverse_kl",
                "prompts_per_round": arguments.batch,
            }
        ],
        "optimizer": {"lr": 1e-5, "schedule": "constant"},
        "checkpoint": {"every": arguments.steps + 1},
        "output": "run",
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))


def model_sizes(arguments: argparse.Namespace) -> dict[str, int]:
    return {
        "vocab_size": arguments.vocab,
        "hidden_size": arguments.hidden,
        "intermediate_size": 3 * arguments.hidden,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.hidden // 64,
        "num_key_value_heads": max(arguments.hidden // 128, 1),
        "head_dim": 64,
    }


def write_model(folder: Path, arguments: argparse.Namespace, seed: int) -> None:
    """Write a random Qwen3 with tied embeddings, as in its small models, and a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = Qwen3Config(**model_sizes(arguments), tie_word_embeddings=True, eos_token_id=0)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():  # about 9 nats of entropy, since uniform teachers are refused
        model.lm_head.weight.mul_(5.0)
    model.save_pretrained(folder)
    words = {"<eos>": 0} | {f"w{i}": i for i in range(1, arguments.vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "pad_token": "<eos>",
        "padding_side": "left",
        "chat_template": "{{ messages[0].content }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
