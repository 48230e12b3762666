"""Supervised training of tiny Qwen3 models, and their accuracy. Deterministic from the seed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from random import Random

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen3Config, Qwen3ForCausalLM

from tiny_experts.settings import Settings, Training
from tiny_experts.tokens import END_ID, PAD_ID, Encoded

# Called after every update with the number of updates made and the most that there can be.
Advance = Callable[[int, int], object]


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


def train(
    model: Qwen3ForCausalLM,
    training: Training,
    rows: Mapping[str, Sequence[Encoded]],
    check: Mapping[str, Sequence[Encoded]],
    *,
    seed: str,
    num_tokens: int,
    advance: Advance,
) -> Qwen3ForCausalLM:
    """A copy trained until the best domain's accuracy on `check` is reached, then cooled down.

    AdamW, linear warm-up, mean cross entropy over all answer tokens of an update. An update takes the
    domains one after the other: lengths are alike within a domain, so little is padded.
    """
    model, random = copy.deepcopy(model), Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    cooldown_start, end = None, training.max_updates
    update = 0
    while update < end:
        factor = min(1.0, (update + 1) / training.warmup_updates)
        if cooldown_start is not None:
            factor *= 1.0 - (update - cooldown_start) / training.cooldown_updates
        for group in optimizer.param_groups:
            group["lr"] = training.lr * factor
        batches = [_batch(random.sample(rows[domain], size)) for domain, size in training.batch.items()]
        num_answer_tokens = sum(int(predicts.sum()) for _, predicts in batches)
        for ids, predicts in batches:
            logits, targets = _answer_logits(model, ids, predicts)
            torch.autograd.backward(cross_entropy(logits, targets, reduction="sum") / num_answer_tokens)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update += 1
        if cooldown_start is None and update % training.check_every == 0:
            best = max(accuracy(model, check[domain], num_tokens=num_tokens) for domain in training.batch)
            if best >= training.until or update >= training.max_updates - training.cooldown_updates:
                cooldown_start, end = update, update + training.cooldown_updates
        advance(update, end)
    return model


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
