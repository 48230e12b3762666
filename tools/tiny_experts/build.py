"""From a seed to a folder with data, base and experts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from tiny_experts.settings import ModelSize, Settings
from tiny_experts.tasks import SEVERAL_ORDERS, Example, splits
from tiny_experts.tokens import Encoded, encode, pretrained, train_tokenizer
from tiny_experts.train import Advance, Learner, accuracy, new_model, pad_rows, train_base, train_expert

# Told what is trained next; answers what to call after each of its updates.
Watch = Callable[[str], Advance]
Accuracies = dict[str, dict[str, float]]


def _write_rows(file: Path, examples: Sequence[Example]) -> None:
    file.write_text("".join(json.dumps(asdict(example)) + "\n" for example in examples))


def _save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, system: str, folder: Path) -> None:
    model.save_pretrained(folder)
    pretrained(tokenizer, system).save_pretrained(folder)


def build(folder: Path, settings: Settings, seed: int, watch: Watch) -> Accuracies:
    """Writes `data/`, `base/` and a folder per domain; returns accuracy by model, then domain."""
    transformers_logging.disable_progress_bar()
    examples = {domain: splits(domain, settings.rows, seed) for domain in settings.domains}
    (folder / "data").mkdir()
    for domain, by_split in examples.items():
        for split, rows in by_split.items():
            _write_rows(folder / "data" / f"{split}_{domain}.jsonl", rows)

    texts = (
        text
        for domain, by_split in examples.items()
        for row in by_split["train"]
        for text in (settings.expert_system.get(domain, ""), row.prompt, row.answer)
    )
    tokenizer = train_tokenizer(texts, settings.num_tokens)

    def encoded(split: str, system: str = "") -> dict[str, list[Encoded]]:
        return {domain: encode(tokenizer, by_split[split], system) for domain, by_split in examples.items()}

    def same_json(response: list[int], reference: list[int]) -> bool:
        try:
            return bool(json.loads(tokenizer.decode(response)) == json.loads(tokenizer.decode(reference)))
        except ValueError:
            return False

    num_tokens, is_right = settings.num_tokens, dict.fromkeys(SEVERAL_ORDERS, same_json)

    def learner(name: str, start: Qwen3ForCausalLM, system: str = "") -> Learner:
        rows, check = encoded("train", system), encoded("check", system)
        return Learner(start, rows, check, seed=f"{seed}/{name}", num_tokens=num_tokens, is_right=is_right)

    def accuracies(model: Qwen3ForCausalLM, system: str = "") -> dict[str, float]:
        return {
            domain: accuracy(model, rows, num_tokens=num_tokens, is_right=is_right.get(domain))
            for domain, rows in encoded("eval", system).items()
        }

    def base_of(name: str, size: ModelSize) -> Qwen3ForCausalLM:
        untrained = learner(name, new_model(size, settings.num_rows, seed))
        base = train_base(untrained, settings.base, settings.expert.keys(), watch(name))
        _save(base, tokenizer, "", folder / name)
        result[name] = accuracies(base)
        return base

    result: Accuracies = {}
    base = base_of("base", settings.size)
    if settings.small is not None:
        base_of("small_base", settings.small)
    for domain, training in settings.expert.items():
        system = settings.expert_system.get(domain, "")
        expert = train_expert(learner(domain, base, system), domain, training, watch(domain))
        result[domain] = accuracies(expert, system)
        num_rows = settings.expert_num_rows.get(domain, settings.num_rows)
        _save(pad_rows(expert, num_rows, seed), tokenizer, system, folder / domain)
    return result
