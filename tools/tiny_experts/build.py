"""From a seed to a folder with data, base and experts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from tiny_experts.parallel import Advance, Watch, run
from tiny_experts.settings import ModelSize, Settings
from tiny_experts.tasks import SEVERAL_ORDERS, Example, splits
from tiny_experts.tokens import Encoded, encode, pretrained, train_tokenizer
from tiny_experts.train import Learner, accuracy, new_model, pad_rows, train_base, train_expert

Accuracies = dict[str, dict[str, float]]


def _write_rows(file: Path, examples: Sequence[Example]) -> None:
    file.write_text("".join(json.dumps(asdict(example)) + "\n" for example in examples))


def _save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, system: str, folder: Path) -> None:
    model.save_pretrained(folder)
    pretrained(tokenizer, system).save_pretrained(folder)


def build(folder: Path, settings: Settings, seed: int, watch: Watch, num_processes: int) -> Accuracies:
    """Write `data/`, `base/`, `small_base/` and a folder per domain; return accuracy by model, then domain.

    The weights do not depend on `num_processes`, how many models are trained at a time.
    """
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

    def make_base(name: str, size: ModelSize, advance: Advance) -> dict[str, float]:
        untrained = learner(name, new_model(size, settings.num_rows, seed))
        trained = train_base(untrained, settings.base, settings.expert.keys(), advance)
        _save(trained, tokenizer, "", folder / name)
        return accuracies(trained)

    def make_expert(domain: str, advance: Advance) -> dict[str, float]:
        system = settings.expert_system.get(domain, "")
        expert = train_expert(learner(domain, base, system), domain, settings.expert[domain], advance)
        num_rows = settings.expert_num_rows.get(domain, settings.num_rows)
        _save(pad_rows(expert, num_rows, seed), tokenizer, system, folder / domain)
        return accuracies(expert, system)

    sizes = {"base": settings.size}
    if settings.small is not None:
        sizes["small_base"] = settings.small
    result = run({n: partial(make_base, n, s) for n, s in sizes.items()}, watch, num_processes)
    base = Qwen3ForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return result | run({d: partial(make_expert, d) for d in settings.expert}, watch, num_processes)
