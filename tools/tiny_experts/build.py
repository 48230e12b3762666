"""From a seed to a folder with data, base and experts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from tiny_experts.parallel import Advance, Watch, run
from tiny_experts.settings import ModelSize, Settings
from tiny_experts.tasks import SEVERAL_ORDERS, Example, splits
from tiny_experts.tokens import Encoded, encode, pretrained, train_tokenizer
from tiny_experts.train import IsRight, Learner, accuracy, new_model, pad_rows, train_base, train_expert

Accuracies = dict[str, dict[str, float]]


def _write_rows(file: Path, examples: Sequence[Example]) -> None:
    file.write_text("".join(json.dumps(asdict(example)) + "\n" for example in examples))


@dataclass(frozen=True)
class Material:
    """What the models of a set are trained on and saved with."""

    tokenizer: Tokenizer
    rows: Callable[[str, str], dict[str, list[Encoded]]]
    """the rows of a split by domain, for a model with this system prompt"""
    pretrained: Callable[[str], PreTrainedTokenizerFast]
    """the tokenizer to save beside a model with this system prompt"""
    is_right: Mapping[str, IsRight] = field(default_factory=dict)
    base_split: str = "train"
    """what bases are trained on"""


def words(folder: Path, settings: Settings, seed: int) -> Material:
    """Write the rows of tasks on words and numbers to `data/`, and train their tokenizer."""
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

    def encoded(split: str, system: str) -> dict[str, list[Encoded]]:
        return {domain: encode(tokenizer, by_split[split], system) for domain, by_split in examples.items()}

    def same_json(response: list[int], reference: list[int]) -> bool:
        try:
            return bool(json.loads(tokenizer.decode(response)) == json.loads(tokenizer.decode(reference)))
        except ValueError:
            return False

    is_right = dict.fromkeys(SEVERAL_ORDERS, same_json)
    return Material(tokenizer, encoded, partial(pretrained, tokenizer), is_right)


def build(
    folder: Path,
    settings: Settings,
    seed: int,
    watch: Watch,
    num_processes: int,
    material: Callable[[Path, Settings, int], Material] = words,
) -> Accuracies:
    """Write `data/`, `base/`, `small_base/` and a folder per domain; return accuracy by model, then domain.

    The weights do not depend on `num_processes`, how many models are trained at a time.
    """
    transformers_logging.disable_progress_bar()
    made = material(folder, settings, seed)
    num_tokens, is_right = settings.num_tokens, made.is_right

    def learner(name: str, start: Qwen3ForCausalLM, split: str, system: str = "") -> Learner:
        rows, check = made.rows(split, system), made.rows("check", system)
        return Learner(start, rows, check, seed=f"{seed}/{name}", num_tokens=num_tokens, is_right=is_right)

    def save(model: Qwen3ForCausalLM, system: str, name: str) -> None:
        model.save_pretrained(folder / name)
        made.pretrained(system).save_pretrained(folder / name)

    def accuracies(model: Qwen3ForCausalLM, system: str = "") -> dict[str, float]:
        return {
            domain: accuracy(model, rows, num_tokens=num_tokens, is_right=is_right.get(domain))
            for domain, rows in made.rows("eval", system).items()
        }

    def make_base(name: str, size: ModelSize, advance: Advance) -> dict[str, float]:
        untrained = learner(name, new_model(size, settings.num_rows, seed), made.base_split)
        trained = train_base(untrained, settings.base, settings.expert.keys(), advance)
        save(trained, "", name)
        return accuracies(trained)

    def make_expert(domain: str, advance: Advance) -> dict[str, float]:
        system = settings.expert_system.get(domain, "")
        expert = train_expert(
            learner(domain, base, "train", system), domain, settings.expert[domain], advance
        )
        num_rows = settings.expert_num_rows.get(domain, settings.num_rows)
        save(pad_rows(expert, num_rows, seed), system, domain)
        return accuracies(expert, system)

    sizes = {"base": settings.size}
    if settings.small is not None:
        sizes["small_base"] = settings.small
    result = run({n: partial(make_base, n, s) for n, s in sizes.items()}, watch, num_processes)
    base = Qwen3ForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return result | run({d: partial(make_expert, d) for d in settings.expert}, watch, num_processes)
