"""From a seed to a folder with data, base and experts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from tiny_experts.settings import Settings
from tiny_experts.tasks import DOMAINS, Example, splits
from tiny_experts.tokens import Encoded, encode, pretrained, train_tokenizer
from tiny_experts.train import Advance, accuracy, new_model, pad_rows, train

# Told what is trained next and for how many updates; answers what to call after each of them.
Watch = Callable[[str, int], Advance]
Accuracies = dict[str, dict[str, float]]


def _write_rows(file: Path, examples: Sequence[Example]) -> None:
    file.write_text("".join(json.dumps(asdict(example)) + "\n" for example in examples))


def _save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, system: str, folder: Path) -> None:
    model.save_pretrained(folder)
    pretrained(tokenizer, system).save_pretrained(folder)


def build(folder: Path, settings: Settings, seed: int, watch: Watch) -> Accuracies:
    """Writes `data/`, `base/` and a folder per domain; returns accuracy by model, then domain."""
    transformers_logging.disable_progress_bar()
    examples = {domain: splits(domain, settings.rows, seed) for domain in DOMAINS}
    (folder / "data").mkdir()
    for domain, by_split in examples.items():
        for split, rows in by_split.items():
            _write_rows(folder / "data" / f"{split}_{domain}.jsonl", rows)

    texts = (
        text
        for by_split in examples.values()
        for row in by_split["train"]
        for text in (row.prompt, row.answer)
    )
    tokenizer = train_tokenizer(texts, settings.num_tokens)

    base = train(
        new_model(settings, seed),
        {domain: encode(tokenizer, by_split["train"]) for domain, by_split in examples.items()},
        updates=settings.base_updates,
        batch=settings.base_batch,
        lr=settings.base_lr,
        warmup_updates=settings.warmup_updates,
        seed=f"{seed}/base",
        advance=watch("base", settings.base_updates),
    )
    _save(base, tokenizer, "", folder / "base")
    accuracies = {"base": _accuracies(base, tokenizer, "", examples)}
    for domain, by_split in examples.items():
        system = settings.expert_system.get(domain, "")
        expert = train(
            base,
            {domain: encode(tokenizer, by_split["train"], system)},
            updates=settings.expert_updates[domain],
            batch={domain: settings.expert_batch},
            lr=settings.expert_lr,
            warmup_updates=settings.warmup_updates,
            seed=f"{seed}/{domain}",
            advance=watch(domain, settings.expert_updates[domain]),
        )
        if domain in settings.expert_num_rows:
            expert = pad_rows(expert, settings.expert_num_rows[domain], seed)
        _save(expert, tokenizer, system, folder / domain)
        accuracies[domain] = _accuracies(expert, tokenizer, system, examples)
    return accuracies


def _accuracies(
    model: Qwen3ForCausalLM,
    tokenizer: Tokenizer,
    system: str,
    examples: Mapping[str, Mapping[str, Sequence[Example]]],
) -> dict[str, float]:
    """Accuracy on the evaluation prompts of every domain, each rendered by the model's own template."""

    def measured(rows: Sequence[Encoded]) -> float:
        return accuracy(model, rows, num_tokens=tokenizer.get_vocab_size())

    return {
        domain: measured(encode(tokenizer, by_split["eval"], system)) for domain, by_split in examples.items()
    }
