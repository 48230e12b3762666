"""Sample in batches in the training process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from mergeopd.loss.heads import Head
from mergeopd.rollout.head import DecodingHead
from mergeopd.rollout.joined import JoinedBody
from mergeopd.rollout.keyed import stream_key, uniforms
from mergeopd.rollout.protocol import Completion, Decoder, EngineContext, GenerationRequest, ReplicaSource
from mergeopd.rollout.routes import recorded
from mergeopd.rollout.sampling import sample
from mergeopd.types import Finish, LogProbs, Routes, Sampling, TokenIds

# Finished rows are dropped from the batch when fewer than this fraction of its rows are unfinished.
_COMPACT_BELOW = 0.75


@dataclass(frozen=True, slots=True)
class Generator:
    """A model that generates: body, prediction head, ids that end its responses, and tokenizer."""

    body: nn.Module
    head: Head
    eos_ids: Collection[int]
    tokenizer: Decoder
    device: torch.device


@dataclass(frozen=True, slots=True)
class FixedWeights:
    """A model whose weights do not change: a loaded model to evaluate, or a teacher during its pass."""

    body: nn.Module
    head: Callable[[], Head]

    @contextmanager
    def unsharded(self) -> Iterator[tuple[nn.Module, Head]]:
        """Yield body and head, which are not copied."""
        yield self.body, self.head()


@dataclass
class LocalEngine:
    """Samples inside the training processes: each has a share of the requests.

    Each has an unsharded replica, or they decode together with one that is sharded (`JoinedBody`).

    `sync_weights` replaces `source`, whose weights are read when responses are waited for. `records_routes`
    keeps which experts of a mixture compute each token.
    """

    source: ReplicaSource
    context: EngineContext
    batch_size: int
    records_routes: bool = False
    _version: int = field(default=0, init=False)

    def submit(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> LocalRollouts:
        return LocalRollouts(lambda on_progress: self._generate(requests, sampling, on_progress))

    def sync_weights(self, source: ReplicaSource, version: int) -> None:
        """Use these weights from now on; nothing is copied."""
        self.source, self._version = source, version

    def close(self) -> None:
        """Do nothing, because no resources are held."""

    def _generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        on_progress: Callable[[int], None],
    ) -> list[Completion]:
        if not requests:
            return []
        with self.source.unsharded() as (body, head):
            context = self.context
            generator = Generator(body, head, context.eos_ids, context.tokenizer, context.device)

            def generate_own(own: Sequence[GenerationRequest]) -> list[Completion]:
                with body.joined() if isinstance(body, JoinedBody) else nullcontext():
                    return generate(
                        generator,
                        own,
                        sampling,
                        seed=context.seed,
                        batch_size=self.batch_size,
                        records_routes=self.records_routes,
                        progress=on_progress,
                    )

            completions = context.deal(requests, generate_own)
        return [replace(completion, policy_version=self._version) for completion in completions]


@dataclass(frozen=True)
class LocalRollouts:
    """Responses that `wait` generates. Collective."""

    wait: Callable[[Callable[[int], None]], list[Completion]]

    def cancel(self) -> None:
        """Do nothing, because nothing was begun."""


def generate(
    generator: Generator,
    requests: Sequence[GenerationRequest],
    sampling: Sampling,
    *,
    seed: int,
    batch_size: int,
    records_routes: bool = False,
    progress: Callable[[int], None],
) -> list[Completion]:
    """Generate a response to every request, in the order of the requests.

    Requests are decoded in batches of similar prompt length; a sequence that ends leaves its batch. The
    result does not depend on the batching beyond floating-point error of the logits. `progress` is called
    with the number of responses generated so far. `records_routes` is for mixtures of experts.
    """
    order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), i))
    completions: dict[int, Completion] = {}
    was_training = generator.body.training
    generator.body.eval()
    head = DecodingHead(generator.head)
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = _Decoding(generator, head, [requests[i] for i in chosen], sampling, seed)
            completions.update(zip(chosen, batch.run(records_routes=records_routes), strict=True))
            progress(len(completions))
    finally:
        generator.body.train(was_training)
    return [completions[i] for i in range(len(requests))]


class _Decoding:
    """Decoding of one batch, with prompts padded on the left."""

    def __init__(
        self,
        generator: Generator,
        head: DecodingHead,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        seed: int,
    ) -> None:
        self._generator = generator
        self._head = head
        self._sampling = sampling
        device = generator.device
        lengths = [len(request.prompt_ids) for request in requests]
        width = max(lengths)
        self._width, self._num_prompt = width, lengths
        self._ids = torch.zeros(len(requests), width, dtype=torch.long)
        self._mask = torch.ones(len(requests), width + sampling.max_new_tokens, dtype=torch.long)
        for row, request in enumerate(requests):
            self._ids[row, width - lengths[row] :] = torch.tensor(request.prompt_ids)
            self._mask[row, : width - lengths[row]] = 0
        self._padded = min(lengths) < width
        self._ids, self._mask = self._ids.to(device), self._mask.to(device)
        self._position = torch.tensor(lengths, device=device)
        keys = [stream_key(seed, request.key, request.sample) for request in requests]
        self._uniform = torch.from_numpy(uniforms(keys, sampling.max_new_tokens)).to(device)
        self._rows = list(range(len(requests)))  # batch row -> index of the request
        # By request and step; entries after the end of a response are not used.
        self._tokens = np.zeros((len(requests), sampling.max_new_tokens), np.int32)
        self._logprobs: LogProbs = np.zeros(self._tokens.shape, np.float32)
        self._finish: dict[int, tuple[Finish, int]] = {}  # with the number of tokens
        self._routes: list[list[Routes]] = [[] for _ in requests]

    @torch.no_grad()
    def run(self, *, records_routes: bool) -> list[Completion]:
        body = self._generator.body
        with recorded(body) if records_routes else nullcontext() as take:
            return self._run(take)

    def _run(self, take_routes: Callable[[], Routes] | None) -> list[Completion]:
        from transformers import DynamicCache

        cache = DynamicCache(config=self._generator.body.config)
        first = torch.arange(self._width, device=self._ids.device)
        pad = (self._width - self._position)[:, None]
        hidden = self._forward(self._ids, (first[None] - pad).clamp(min=0), cache, self._width)
        if take_routes is not None:
            self._record(take_routes(), self._position.tolist())
        for step in range(self._sampling.max_new_tokens):
            token = self._sample(hidden, step)
            alive = [i for i, row in enumerate(self._rows) if row not in self._finish]
            if not alive:
                break
            if len(alive) < _COMPACT_BELOW * len(self._rows):
                token = self._compact(alive, token, cache)
            if step + 1 < self._sampling.max_new_tokens:
                hidden = self._forward(token[:, None], self._position[:, None], cache, self._width + step + 1)
                if take_routes is not None:
                    self._record(take_routes(), [1] * len(self._rows))
                self._position = self._position + 1
        completions = []
        for row in range(len(self._tokens)):
            finish, num = self._finish.get(row, ("length", self._sampling.max_new_tokens))
            # Copies, because a view would keep the whole batch.
            own = self._tokens[row, :num].copy(), self._logprobs[row, :num].copy()
            routes = None
            if take_routes is not None:
                # A row continues after its end until it is dropped; its last token was not fed to the model.
                known = self._num_prompt[row] + num - 1
                routes = np.concatenate(self._routes[row])[:known].copy()
            completions.append(Completion(*own, finish, routes=routes))
        return completions

    def _record(self, routes: Routes, lengths: Sequence[int]) -> None:
        """Keep the routes of the last `lengths` tokens of each row."""
        by_row = routes.reshape(len(self._rows), -1, *routes.shape[1:])
        for row, own, num in zip(self._rows, by_row, lengths, strict=True):
            self._routes[row].append(own[-num:])

    def _forward(self, ids: Tensor, position: Tensor, cache: object, seen: int) -> Tensor:
        """Return the hidden states `[rows, d]` of the last position."""
        output = self._generator.body(
            input_ids=ids,
            # Without padding, a mask only costs time.
            attention_mask=self._mask[:, :seen] if self._padded else None,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state[:, -1]
        return hidden

    def _sample(self, hidden: Tensor, step: int) -> Tensor:
        """Sample the next token of every row, and record those of unfinished rows."""
        logits = self._head.logits(hidden)
        token, logprob = sample(
            logits, self._uniform[:, step], self._sampling.temperature, self._sampling.top_p
        )
        if step == 0 and logprob.dtype == torch.float64:
            self._logprobs = self._logprobs.astype(np.float64)
        self._tokens[self._rows, step] = token.cpu().numpy()
        self._logprobs[self._rows, step] = logprob.cpu().numpy()
        for row, one in zip(self._rows, token.tolist(), strict=True):
            if row in self._finish:
                continue
            if one in self._generator.eos_ids:
                self._finish[row] = "eos", step + 1
            elif self._sampling.stop and self._has_stopped(self._tokens[row, : step + 1]):
                self._finish[row] = "stop", step + 1
        return token

    def _has_stopped(self, tokens: TokenIds) -> bool:
        # A token has at least one byte, so the last tokens contain any stop text that has just ended.
        longest = max(len(stop.encode()) for stop in self._sampling.stop)
        tail = self._generator.tokenizer.decode(tokens[-longest - 1 :].tolist(), skip_special_tokens=False)
        return any(stop in tail for stop in self._sampling.stop)

    def _compact(self, alive: list[int], token: Tensor, cache: object) -> Tensor:
        keep = torch.tensor(alive, device=token.device)
        cache.batch_select_indices(keep)  # type: ignore[attr-defined]
        self._rows = [self._rows[i] for i in alive]
        self._mask, self._position = self._mask[keep], self._position[keep]
        self._uniform = self._uniform[keep]
        return token[keep]
