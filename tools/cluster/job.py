"""The job of a simulated run: models of a few weights, prompts, recipe."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

LETTERS = "abcdefghijklmnopqrstuvwxyz"
_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


def write_job(folder: Path, *, teachers: int, prompts: int, samples: int, tokens: int, rounds: int) -> Path:
    """Write student, teachers, a domain of prompts for each teacher, and the recipe of `rounds` rounds.

    The last teacher has another tokenizer. Nothing of the models but their files is used.
    """
    names = [f"teacher-{i}" for i in range(teachers)]
    _write_model(folder / "student", merges=True)
    _write_model(folder / names[-1], merges=False)
    rng = random.Random(0)
    sources = []
    for i, name in enumerate(names):
        if i + 1 < teachers:
            shutil.copytree(folder / "student", folder / name)
        (folder / f"{name}.yaml").write_text(json.dumps({"card": 1, "name": name, "model": name}))
        rows = [
            {
                "prompt": "".join(rng.choices(LETTERS, k=rng.randrange(100, 300))),
                "answer": rng.choice(LETTERS),
            }
            for _ in range(rounds * -(-prompts // teachers))
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        sources.append({"source": f"{name}.jsonl", "domain": name, "teachers": name, "verifier": "exact"})
    recipe: dict[str, Any] = {
        "recipe": 1,
        "name": "cluster",
        "threads": 1,
        "student": {"model": "student", "micro_batch_tokens": 1 << 15},
        "teachers": {name: f"{name}.yaml" for name in names[:-1]}
        | {names[-1]: {"card": f"{names[-1]}.yaml", "bridge": "pieces"}},
        "prompts": sources,
        "rollout": {"samples_per_prompt": samples, "max_new_tokens": 2 * tokens},
        "phases": [
            {
                "name": "merge",
                "updates": 100 * rounds,
                "loss": {"reverse_kl": 1.0, "outcome": 0.3},
                "correction": {"kind": "sequence_mask", "low": 0.5, "high": 2.0},
                "balance": {"tokens": "equal"},
                "prompts_per_round": prompts,
            }
        ],
        "optimizer": {"lr": 1e-6, "schedule": "constant"},
        "checkpoint": {"every": rounds},
        "output": "run",
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def _write_model(folder: Path, *, merges: bool) -> None:
    """Write a Qwen3 of a few weights, and a tokenizer of bytes, with some pairs of letters where `merges`."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in LETTERS for b in LETTERS] if merges else []
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    backend = Tokenizer(models.BPE(vocab, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=backend.get_vocab_size(),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        eos_token_id=backend.token_to_id("<end>"),
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<end>", "chat_template": _TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
