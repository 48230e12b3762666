"""The tiny experts from which pairs are made, and their further training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

import torch
from tiny_experts.settings import ExpertTraining, Settings
from tiny_experts.tasks import Example
from tiny_experts.tokens import ASSISTANT, END, SYSTEM, USER, Encoded
from tiny_experts.train import Learner, train_expert
from tokenizers import AddedToken, Tokenizer
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

TEXT_END = "<|endoftext|>"
"""The token that ends texts of base models."""
CHECK = 64  # rows on which accuracy is measured


@dataclass(frozen=True)
class Experts:
    """A set of tiny experts: a folder with `data/`, `base/`, `small_base/` and a folder per domain."""

    folder: Path
    settings: Settings
    seed: int

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.folder / "base" / "tokenizer.json"))

    def with_tokens(self, tokens: Sequence[str]) -> Tokenizer:
        """Return the tokenizer with more tokens; tags remain in decoded text, as those of released models."""
        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        tokenizer.add_tokens(
            [AddedToken(text, special=text == TEXT_END, normalized=False) for text in tokens]
        )
        return tokenizer

    def prompts(self, domain: str) -> Path:
        """Return the file of a domain's prompts for merges."""
        return self.folder / "data" / f"merge_{domain}.jsonl"

    def rows(self, domain: str) -> list[Example]:
        """Return the rows that the domain's expert was trained on."""
        lines = (self.folder / "data" / f"train_{domain}.jsonl").read_text().splitlines()
        return [Example(**json.loads(line)) for line in lines]

    def encode(
        self, rows: Sequence[Example], *, tokens: Sequence[str] = (), opening: str = "", system: str = ""
    ) -> list[Encoded]:
        """Encode conversations with `tokens` added to the vocabulary; `opening` follows the assistant's role.

        Every text ends at a special token, so prompts and responses are encoded by themselves.
        """
        tokenizer = self.with_tokens(tokens)
        before = f"{SYSTEM}{system}" if system else ""
        prompts = tokenizer.encode_batch([f"{before}{USER}{row.prompt}{ASSISTANT}{opening}" for row in rows])
        answers = tokenizer.encode_batch([f"{row.answer}{END}" for row in rows])
        return [Encoded(prompt.ids, answer.ids) for prompt, answer in zip(prompts, answers, strict=True)]

    def train(
        self, start: Path, rows: Sequence[Encoded], *, updates: int, enough: float = 1.0, cooldown: int = 0
    ) -> Qwen3ForCausalLM:
        """Return a copy of a model that is trained on `rows`; the learning rate falls to zero at the end.

        It falls during `cooldown` updates, by default the whole training: from the update after which the
        accuracy is `enough`, or so that there are at most `updates`.
        """
        cooldown = cooldown or updates
        training = ExpertTraining(48, enough, cooldown_updates=cooldown, max_updates=updates)
        learner = Learner(
            load(start),
            {"": rows[CHECK:]},
            {"": rows[:CHECK]},
            seed=f"{self.seed}/{start.name}",
            num_tokens=self.settings.num_rows,
        )
        return train_expert(learner, "", training, lambda update, end: None)


def load(folder: Path) -> Qwen3ForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model, Qwen3ForCausalLM)
    return model


def random_tails(rows: Sequence[Encoded], depth: int, seed: int) -> list[Encoded]:
    """Replace response tokens from `depth` on, but not the end token, by random ones of all responses."""
    random = Random(seed)
    ids = sorted({i for row in rows for i in row.answer_ids[:-1]})
    return [_with_tail(row, depth, [random.choice(ids) for _ in row.answer_ids[depth:-1]]) for row in rows]


def swapped_tails(rows: Sequence[Encoded], depth: int, seed: int) -> list[Encoded]:
    """Replace response tokens from `depth` on, but not the end token, by those of another response."""
    others = Random(seed).sample(list(rows), len(rows))
    return [
        _with_tail(row, depth, other.answer_ids[depth:-1]) for row, other in zip(rows, others, strict=True)
    ]


def _with_tail(row: Encoded, depth: int, tail: list[int]) -> Encoded:
    return Encoded(row.prompt_ids, [*row.answer_ids[:depth], *tail, row.answer_ids[-1]])


def thoughtful(rows: Sequence[Example], begin: str, end: str) -> list[Example]:
    """Put the words of each answer in reverse order before it, between two tags: its reasoning."""
    return [
        Example(row.prompt, f"{begin}{' '.join(reversed(row.answer.split()))}{end}{row.answer}")
        for row in rows
    ]


Change = Callable[[Qwen3ForCausalLM], None]


def permute_rows(ids: Sequence[int]) -> Change:
    """Return a change that gives each token of `ids` the embedding (and head row) of the one before it."""

    def change(model: Qwen3ForCausalLM) -> None:
        rows = model.get_input_embeddings().weight
        rows[list(ids)] = rows[[ids[-1], *ids[:-1]]].clone()

    return change


def new_head(std: float, seed: int) -> Change:
    """Return a change that gives a model a random head of its own."""

    def change(model: Qwen3ForCausalLM) -> None:
        shape = model.get_input_embeddings().weight.shape
        random = std * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        model.lm_head.weight = torch.nn.Parameter(random)
        model.config.tie_word_embeddings = False

    return change


def towards(other: Path, share: float) -> Change:
    """Return a change that moves weights a share of the way to those of another model of the same shape."""

    def change(model: Qwen3ForCausalLM) -> None:
        for mine, theirs in zip(model.parameters(), load(other).parameters(), strict=True):
            mine.lerp_(theirs[: len(mine)], share)

    return change
