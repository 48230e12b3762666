"""Supervised training of tiny Qwen3 models, and their accuracy. Deterministic from the seed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from random import Random
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen3Config, Qwen3ForCausalLM

from tiny_experts.parallel import Advance
from tiny_experts.settings import BaseTraining, ExpertTraining, ModelSize
from tiny_experts.tokens import END_ID, PAD_ID, Encoded

Rows = Mapping[str, Sequence[Encoded]]
# Whether a response means the same as the reference; both are token ids.
IsRight = Callable[[list[int], list[int]], bool]


def new_model(size: ModelSize, num_rows: int, seed: int) -> Qwen3ForCausalLM:
    """Create a Qwen3 with random weights; its generation config ends at the end token."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=num_rows,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_key_value_heads,
        head_dim=size.head_dim,
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
        trained = True if row.trained is None else torch.tensor(row.trained)
        line[first : first + len(row.answer_ids)] = trained
    return ids, predicts


def _answer_logits(model: Qwen3ForCausalLM, ids: Tensor, predicts: Tensor) -> tuple[Tensor, Tensor]:
    """Logits `[n, rows]` and targets `[n]` of the answer tokens; the head runs on these positions only."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return model.lm_head(hidden[predicts]), ids.roll(-1, dims=1)[predicts]


class Learner:
    """A copy of a model with its optimizer and its rows.

    `is_right` has the domains with several right responses.
    """

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        rows: Rows,
        check: Rows,
        *,
        seed: str,
        num_tokens: int,
        is_right: Mapping[str, IsRight] = MappingProxyType({}),
    ) -> None:
        self.model = copy.deepcopy(model)
        self._rows, self._check, self._random, self._num_tokens = rows, check, Random(seed), num_tokens
        self._is_right = is_right
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
        """Return the accuracy on the held-back rows."""
        return accuracy(
            self.model,
            self._check[domain],
            num_tokens=self._num_tokens,
            is_right=self._is_right.get(domain),
        )


def train_base(
    learner: Learner, training: BaseTraining, capped: Collection[str], advance: Advance
) -> Qwen3ForCausalLM:
    """Train a model that knows a little of every domain, and of the `capped` ones no more than `ceiling`.

    A domain that is good enough gets fewer rows or none until it falls behind; one that leaped past the
    ceiling between two checks gets none until it has fallen below. Returns the best checked state below the
    ceiling: the one whose weakest domain, as a share of what is enough, is strongest, of equal ones the one
    with the best mean.
    """
    best_shares, best = (-1.0, 0.0), learner.model
    learning = dict(training.batch)
    for update in range(1, training.max_updates + 1):
        learner.update(training.lr * min(1.0, update / training.warmup_updates), learning)
        advance(update, training.max_updates)
        if update % training.check_every:
            continue
        reached = {domain: learner.accuracy(domain) for domain in training.batch}
        shares = [min(1.0, reached[domain] / training.enough[domain]) for domain in reached]
        weakest_and_mean = min(shares), sum(shares) / len(shares)
        highest = max((reached[domain] for domain in capped), default=0.0)
        if highest <= training.ceiling and weakest_and_mean > best_shares:
            best_shares, best = weakest_and_mean, copy.deepcopy(learner.model)
        behind = {domain for domain in reached if reached[domain] < training.enough[domain]}
        if not behind and highest <= training.ceiling:
            advance(update, update)
            break
        above = {domain for domain in capped if reached[domain] > training.ceiling}
        rows = {
            domain: size if domain in behind else training.paused(size)
            for domain, size in training.batch.items()
        }
        learning = {domain: size for domain, size in rows.items() if size and domain not in above}
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
def accuracy(
    model: Qwen3ForCausalLM, rows: Sequence[Encoded], *, num_tokens: int, is_right: IsRight | None = None
) -> float:
    """Return the share of prompts whose greedy response is right.

    Without `is_right` the response must be the reference, token for token. Greedy decoding returns the
    reference exactly when each of its tokens is the most probable one after those before it, so a single
    forward pass over the references is enough.
    """
    if is_right is not None:
        responses = _greedy(model, rows, num_tokens)
        return sum(map(is_right, responses, (row.answer_ids for row in rows))) / len(rows)
    num_right = 0
    ordered = sorted(rows, key=lambda row: len(row.prompt_ids) + len(row.answer_ids))
    for start in range(0, len(ordered), 128):
        ids, predicts = _batch(ordered[start : start + 128])
        logits, targets = _answer_logits(model, ids, predicts)
        agrees = logits[:, :num_tokens].argmax(dim=-1) == targets
        num_right += sum(bool(answer.all()) for answer in torch.split(agrees, predicts.sum(dim=1).tolist()))
    return num_right / len(rows)


def _greedy(model: Qwen3ForCausalLM, rows: Sequence[Encoded], num_tokens: int) -> list[list[int]]:
    """Return greedy responses, each up to and including its end token."""
    longest = max(len(row.prompt_ids) for row in rows)
    padding = [longest - len(row.prompt_ids) for row in rows]
    ids = torch.tensor([[PAD_ID] * n + row.prompt_ids for n, row in zip(padding, rows, strict=True)])
    generated = model.generate(
        ids,
        attention_mask=(torch.arange(longest) >= torch.tensor(padding)[:, None]).long(),
        max_new_tokens=max(len(row.answer_ids) for row in rows) + 4,
        do_sample=False,
        suppress_tokens=list(range(num_tokens, model.config.vocab_size)),
    )
    responses = generated[:, longest:].tolist()
    return [r[: r.index(END_ID) + 1] if END_ID in r else r for r in responses]
