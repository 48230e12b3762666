"""Supervised training of tiny Qwen3 models, and their accuracy. Deterministic from the seed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from random import Random

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen3Config, Qwen3ForCausalLM

from tiny_experts.settings import BaseTraining, ExpertTraining, Settings
from tiny_experts.tokens import END_ID, PAD_ID, Encoded

# Called after every update with the number of updates made and the most that there can be.
Advance = Callable[[int, int], object]
Rows = Mapping[str, Sequence[Encoded]]


def new_model(settings: Settings, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights; its generation config ends at the end token."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=settings.num_rows,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_key_value_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        eos_token_id=END_ID,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def pad_rows(model: Qwen3ForCausalLM, num_rows: int, seed: int) -> Qwen3ForCausalLM:
    """A copy whose embedding and head have `num_rows` rows; the new ones, which no token uses, are noise."""
    padded = copy.deepcopy(model)
    padded.resize_token_embeddings(num_rows, mean_resizing=False)
    rows = padded.get_input_embeddings().weight
    first = model.config.vocab_size
    with torch.no_grad():
        rows[first:] = 0.02 * torch.randn(rows[first:].shape, generator=torch.Generator().manual_seed(seed))
    return padded


def _batch(rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and the mask of the positions that predict an answer token, each `[rows, length]`.

    Padding comes last, so causal attention never sees it and no attention mask is needed.
    """
    texts = [torch.tensor(row.prompt_ids + row.answer_ids) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=PAD_ID)
    predicts = torch.zeros(ids.shape, dtype=torch.bool)
    for line, row in zip(predicts, rows, strict=True):
        first = len(row.prompt_ids) - 1
        line[first : first + len(row.answer_ids)] = True
    return ids, predicts


def _answer_logits(model: Qwen3ForCausalLM, ids: Tensor, predicts: Tensor) -> tuple[Tensor, Tensor]:
    """Logits `[n, rows]` and targets `[n]` of the answer tokens; the head runs on these positions only."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return model.lm_head(hidden[predicts]), ids.roll(-1, dims=1)[predicts]


class Learner:
    """A copy of a model with its optimizer and its rows; draws batches, updates, and says what it can."""

    def __init__(
        self, model: Qwen3ForCausalLM, rows: Rows, check: Rows, *, seed: str, num_tokens: int
    ) -> None:
        self.model = copy.deepcopy(model)
        self._rows, self._check, self._random, self._num_tokens = rows, check, Random(seed), num_tokens
        parameters = self.model.parameters()
        self._optimizer = torch.optim.AdamW(
            parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )

    def update(self, lr: float, batch: Mapping[str, int]) -> None:
        """One AdamW update on the mean cross entropy over all answer tokens of `batch` rows per domain.

        The domains go one after the other: lengths are alike within a domain, so little is padded.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        batches = [_batch(self._random.sample(self._rows[domain], size)) for domain, size in batch.items()]
        num_answer_tokens = sum(int(predicts.sum()) for _, predicts in batches)
        for ids, predicts in batches:
            logits, targets = _answer_logits(self.model, ids, predicts)
            torch.autograd.backward(cross_entropy(logits, targets, reduction="sum") / num_answer_tokens)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def accuracy(self, domain: str) -> float:
        """On the held-back rows."""
        return accuracy(self.model, self._check[domain], num_tokens=self._num_tokens)


def train_base(learner: Learner, training: BaseTraining, advance: Advance) -> Qwen3ForCausalLM:
    """A model that knows a little of every domain, and of none more than `ceiling`.

    A domain that is good enough sits out until it has fallen behind. A leap may pass the ceiling between
    two looks, so the best of the states that were looked at is taken: the one whose weakest domain, as a
    share of what is enough, is strongest.
    """
    best_share, best = -1.0, learner.model
    learning = dict(training.batch)
    for update in range(1, training.max_updates + 1):
        learner.update(training.lr * min(1.0, update / training.warmup_updates), learning)
        advance(update, training.max_updates)
        if update % training.check_every:
            continue
        reached = {domain: learner.accuracy(domain) for domain in training.batch}
        share = min(reached[domain] / training.enough[domain] for domain in reached)
        if max(reached.values()) <= training.ceiling and share > best_share:
            best_share, best = share, copy.deepcopy(learner.model)
        learning = {
            domain: size
            for domain, size in training.batch.items()
            if reached[domain] < training.enough[domain]
        }
        if not learning:
            advance(update, update)
            break
    return best


def train_expert(
    learner: Learner, domain: str, training: ExpertTraining, advance: Advance
) -> Qwen3ForCausalLM:
    """A model trained until its domain's accuracy is `enough`, then while the learning rate falls to zero."""
    update, start, end = 0, None, training.max_updates
    while update < end:
        factor = min(1.0, (update + 1) / training.warmup_updates)
        if start is not None:
            factor *= 1.0 - (update - start) / training.cooldown_updates
        learner.update(training.lr * factor, {domain: training.batch})
        update += 1
        if start is None and update % training.check_every == 0:
            latest = training.max_updates - training.cooldown_updates
            if update >= latest or learner.accuracy(domain) >= training.enough:
                start, end = update, update + training.cooldown_updates
        advance(update, end)
    return learner.model


@torch.no_grad()
def accuracy(model: Qwen3ForCausalLM, rows: Sequence[Encoded], *, num_tokens: int) -> float:
    """Share of prompts whose greedy answer is the reference, token for token.

    Greedy decoding writes the reference exactly when each of its tokens is the best one after those before
    it, so a single forward pass over the references tells; nothing need be generated.
    """
    num_right = 0
    ordered = sorted(rows, key=lambda row: len(row.prompt_ids) + len(row.answer_ids))
    for start in range(0, len(ordered), 128):
        ids, predicts = _batch(ordered[start : start + 128])
        logits, targets = _answer_logits(model, ids, predicts)
        agrees = logits[:, :num_tokens].argmax(dim=-1) == targets
        num_right += sum(bool(answer.all()) for answer in torch.split(agrees, predicts.sum(dim=1).tolist()))
    return num_right / len(rows)
