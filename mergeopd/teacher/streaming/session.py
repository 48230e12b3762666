"""A teacher's session that computes layer by layer, each for all sequences of a pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mergeopd.batch.packing import length_batches
from mergeopd.distributed.communicator import Communicator
from mergeopd.loss.heads import Head
from mergeopd.models.causal import empty, fill, padded
from mergeopd.rollout.protocol import RolloutEngine
from mergeopd.teacher.canary import Canary
from mergeopd.teacher.protocol import TargetSpec, TeacherSequence, TeacherSession
from mergeopd.teacher.scoring import FiniteCheck, reduced, rows_of
from mergeopd.teacher.streaming.layers import LayeredBody
from mergeopd.teacher.streaming.reader import LayerReader
from mergeopd.teacher.streaming.weights import StreamedWeights
from mergeopd.transfers import to_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class _Batch:
    """Sequences of one forward pass, by their index; those of the canary have none."""

    indices: tuple[int, ...] | None
    ids: Tensor
    rows: Tensor

    @classmethod
    def of(cls, indices: Sequence[int] | None, sequences: Sequence[TeacherSequence]) -> _Batch:
        prompts, responses, trained = zip(
            *((one.prompt_ids, one.response_ids, one.trained) for one in sequences), strict=True
        )
        return cls(None if indices is None else tuple(indices), *padded(prompts, responses, trained))


@dataclass(eq=False)
class StreamedSession:
    """A teacher of whose body one layer is in memory while the next is read; collective if `ranks` are.

    All ranks must score equally often; each scores its own sequences. A pass takes batches of at most
    `pass_tokens` tokens in all, or one batch. `take_canary` returns the sample to verify, once: it is scored
    with the first sequences. `load` opens the whole body, which generation needs.
    """

    name: str
    body: PreTrainedModel
    weights: StreamedWeights
    device: torch.device
    ranks: Communicator
    pass_tokens: int
    read_head: Callable[[], Head]
    take_canary: Callable[[], Canary | None]
    load: Callable[[], AbstractContextManager[TeacherSession]]
    opened: ExitStack
    _whole: TeacherSession | None = field(init=False, default=None)

    def score(
        self, sequences: Sequence[TeacherSequence], spec: TargetSpec, max_tokens: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield `(index, [trained tokens, width])` for every sequence; see `TeacherSession.score`.

        Raises TeacherError when a hidden state is not finite, or the canary does not match.
        """
        if self._whole is not None:
            return self._whole.score(sequences, spec, max_tokens)
        states = self.hidden(sequences, max_tokens)
        if spec.kind == "hidden":
            return states
        return reduced(self.name, states, sequences, self.read_head, spec)

    def generator(self) -> RolloutEngine:
        """Load the whole body, until the session ends, and return its engine."""
        if self._whole is None:
            self._whole = self.opened.enter_context(self.load())
        return self._whole.generator()

    @torch.no_grad()
    def hidden(self, sequences: Sequence[TeacherSequence], max_tokens: int) -> Iterator[tuple[int, Tensor]]:
        """Yield `(index, [trained tokens, d_T])` for every sequence, in batches of at most `max_tokens`."""
        canary = self.take_canary()
        groups = length_batches([sequence.num_tokens for sequence in sequences], max_tokens)
        batches = [_Batch.of(indices, [sequences[i] for i in indices]) for indices in groups]
        if canary is not None:  # in a batch of its own, so that the others do not change
            batches.insert(0, _Batch.of(None, [canary.sequence]))
        passes = list(self._passes(batches))
        body, weights, check = LayeredBody(self.body), self.weights, FiniteCheck(self.name)
        reader = LayerReader(
            weights.checkpoint,
            weights.layers,
            len(passes),
            self.ranks,
            self.device,
            is_copied=weights.is_copied,
        )
        try:
            with body.apart(), reader:
                for number in range(reader.num_passes()):
                    own = passes[number] if number < len(passes) else []
                    for batch, states in self._pass(body, reader, own):
                        if batch.indices is not None:
                            check.add(states)
                            yield from rows_of(states, batch.indices, sequences)
                        elif canary is not None:
                            canary.verify(states, self.read_head())
                    check.end()
        finally:
            weights.count(reader.bytes_read)
            empty(self.body)

    def _passes(self, batches: Sequence[_Batch]) -> Iterator[list[_Batch]]:
        own: list[_Batch] = []
        for batch in batches:
            if own and sum(one.ids.numel() for one in (*own, batch)) > self.pass_tokens:
                yield own
                own = []
            own.append(batch)
        if own:
            yield own

    def _pass(
        self, body: LayeredBody, reader: LayerReader, batches: Sequence[_Batch]
    ) -> Iterator[tuple[_Batch, Tensor]]:
        """Yield the last hidden states of the trained tokens of each batch."""
        hidden = self._embedded(body, batches)
        for index, tensors in enumerate(reader.layers()):
            if not hidden:
                deque(tensors, maxlen=0)
                continue
            layer = body.layers[index]
            fill(layer, self.weights.of_layer(index, tensors))
            for number, states in enumerate(hidden):
                hidden[number] = body.layer(index, states)
            empty(layer)
        for number, batch in enumerate(batches):
            states, hidden[number] = body.finish(hidden[number]), torch.empty(0)
            yield batch, states.flatten(0, 1).index_select(0, to_device(batch.rows, self.device))
        body.forget()

    def _embedded(self, body: LayeredBody, batches: Sequence[_Batch]) -> list[Tensor]:
        """Return the hidden states that the first layer gets, `[B, T, d]` of each batch."""
        if not batches:
            return []
        used, places = np.unique(
            np.concatenate([b.ids.numpy().ravel() for b in batches]), return_inverse=True
        )
        fill(self.body, self.weights.around())
        embedding = self.body.get_input_embeddings()
        fill(embedding, {"weight": self.weights.rows(used)})
        sizes = [batch.ids.numel() for batch in batches]
        of_batches = torch.split(torch.from_numpy(places.ravel()), sizes)
        hidden = [
            body.embed(to_device(own.view(batch.ids.shape), self.device))
            for batch, own in zip(batches, of_batches, strict=True)
        ]
        empty(embedding)
        return hidden
