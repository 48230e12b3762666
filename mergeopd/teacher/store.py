"""Teachers live on disk; one is in memory during its turn and gone after it. Those that follow the student
live in memory.

How a body's weights are read is a `Reader`'s business. By default they are memory-mapped safetensors: on a
CPU, where the file already has the computing precision, nothing is copied, and the pages belong to the file
cache, not to the process. A teacher's prediction head is not part of its turn; the update fetches it, whole
or some of its rows, keyed by checkpoint, so teachers that share one checkpoint share one head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mergeopd.errors import TeacherError
from mergeopd.loss.heads import Head
from mergeopd.models.batching import length_batches
from mergeopd.models.causal import (
    DTYPES,
    build_skeleton,
    check_fit,
    empty,
    fill,
    response_hidden,
    tensor_names,
)
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.facts import ModelFacts, head_tensor
from mergeopd.teacher.past import Follower
from mergeopd.teacher.reading import MappedReader, Reader

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Checkpoint fingerprint; rule and version of weights that follow the student; dtype; true vocabulary; rows.
_HeadKey = tuple[str, tuple[str, int] | None, str, int, tuple[int, int] | None]


@dataclass(frozen=True, slots=True)
class TeacherSource:
    """Where a teacher's weights lie and how they are used. `num_valid` is its true vocabulary.

    With a `follower` the folder says what the model looks like, and the weights are the follower's.
    """

    model: Path
    dtype: str
    num_valid: int
    follower: Follower | None = None


class LoadedTeacher:
    """A teacher during its turn."""

    def __init__(self, name: str, body: nn.Module, device: torch.device) -> None:
        self.name = name
        self.body = body
        self._device = device

    @torch.no_grad()
    def hidden(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        max_tokens: int,
        trained: Sequence[Sequence[bool] | None] | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield `(index, [trained tokens, d_T])` for every pair, in batches of at most `max_tokens`.

        `trained` as in `response_hidden`. Raises TeacherError when a hidden state is not finite.
        """
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
        flags = [None] * len(lengths) if trained is None else trained
        for batch in length_batches(lengths, max_tokens):
            own = [flags[i] for i in batch]
            sizes = [len(responses[i]) if f is None else sum(f) for i, f in zip(batch, own, strict=True)]
            states = response_hidden(
                self.body, [prompts[i] for i in batch], [responses[i] for i in batch], self._device, own
            )
            if not torch.isfinite(states).all():
                raise TeacherError(
                    f"teacher {self.name!r} produced NaN or infinite hidden states; "
                    "its weights are damaged or its dtype is too narrow (try dtype: float32)"
                )
            # A clone each: a view would keep the whole batch alive when most of it is spilled or dropped.
            for index, rows in zip(batch, torch.split(states, sizes), strict=True):
                yield index, rows.clone()


class TeacherStore:
    """All teachers of a run, by name. Raises ModelError when a checkpoint does not fit its config.

    `bytes_read` counts checkpoint bytes that this process brought in: headers and its part of the tensors of
    every turn, and every head or its rows. `reader` is memory-mapped by default.
    """

    def __init__(
        self, sources: Mapping[str, TeacherSource], device: torch.device, reader: Reader | None = None
    ) -> None:
        self._sources = dict(sources)
        self._device = device
        self._reader = MappedReader() if reader is None else reader
        self._checkpoints = {name: Checkpoint.open(s.model) for name, s in self._sources.items()}
        self._facts = {name: ModelFacts.read(s.model) for name, s in self._sources.items()}
        self._skeletons: dict[tuple[str, str], PreTrainedModel] = {}
        self._heads: dict[_HeadKey, Head] = {}
        self.bytes_read = 0
        for name, checkpoint in self._checkpoints.items():
            check_fit(self._skeleton(name), self._facts[name], checkpoint)

    @contextmanager
    def open(self, name: str) -> Iterator[LoadedTeacher]:
        """Bring a teacher's body in; it is dropped when the context ends. Collective where the reader is."""
        model = self._skeleton(name)
        try:
            fill(model, self._body(name))
            yield LoadedTeacher(name, model.base_model, self._device)
        finally:
            empty(model)

    def fingerprint(self, name: str) -> str:
        """Digest of the teacher's checkpoint. Weights that follow the student have none: ValueError."""
        if self._sources[name].follower is not None:
            raise ValueError(f"teacher {name!r} follows the student, so no checkpoint is its own")
        return self._checkpoints[name].fingerprint

    def read_ahead(self, name: str) -> None:
        """Ask the system to bring a teacher's files into its cache, and go on; no memory of ours is used."""
        if self._sources[name].follower is None:
            self._reader.read_ahead(self._checkpoints[name], list(self._body_tensors(name).values()))

    def heads(self, names: Iterable[str], vocab: range | None = None) -> dict[str, Head]:
        """The prediction heads of these teachers; heads of all others are dropped. Not collective.

        With `vocab` only the rows of these token ids, which must belong to every teacher's true vocabulary
        (else ValueError), as one rank of a tensor-parallel group scores them.
        """
        wanted = {name: self._head_key(name, vocab) for name in names}
        self._heads = {key: head for key, head in self._heads.items() if key in wanted.values()}
        for name, key in wanted.items():
            if key not in self._heads:
                self._heads[key] = self._load_head(name, vocab)
        return {name: self._heads[key] for name, key in wanted.items()}

    def _head_key(self, name: str, vocab: range | None) -> _HeadKey:
        source, follower = self._sources[name], self._sources[name].follower
        # A follower's weights are never the folder's, nor its own of another round.
        moved = None if follower is None else (follower.label, follower.version)
        # Not the range itself: all empty ones are equal.
        rows = None if vocab is None else (vocab.start, vocab.stop)
        return self._checkpoints[name].fingerprint, moved, source.dtype, source.num_valid, rows

    def _load_head(self, name: str, vocab: range | None) -> Head:
        facts, checkpoint = self._facts[name], self._checkpoints[name]
        num_valid = self._sources[name].num_valid
        if vocab is not None and not (vocab.step == 1 and 0 <= vocab.start <= vocab.stop <= num_valid):
            raise ValueError(f"teacher {name!r} has {num_valid} true tokens, so none in {vocab}")
        parameter = facts.embedding_name if facts.tied else facts.head_name
        bias = facts.head_bias_name
        return Head(
            weight=self._head_rows(name, parameter, head_tensor(facts, checkpoint), vocab),
            bias=self._head_rows(name, bias, bias, vocab) if bias else None,
            scale=facts.logit_scale,
            softcap=facts.softcap,
            num_valid=num_valid if vocab is None else len(vocab),
            vocab_start=0 if vocab is None else vocab.start,
        )

    def _head_rows(self, name: str, parameter: str, tensor_name: str, vocab: range | None) -> Tensor:
        """Rows of a follower's parameter where there is one, else of the checkpoint's tensor."""
        follower, checkpoint = self._sources[name].follower, self._checkpoints[name]
        info = checkpoint.tensors[tensor_name]
        rows = range(info.shape[0]) if vocab is None else vocab
        if follower is not None:
            return self._converted(name, follower.tensors[parameter][rows.start : rows.stop])
        self.bytes_read += info.num_bytes * len(rows) // info.shape[0]
        return self._converted(name, checkpoint.read_rows(tensor_name, rows.start, rows.stop))

    def _body_tensors(self, name: str) -> dict[str, str]:
        """Parameter of the body -> name of its tensor."""
        facts = self._facts[name]
        head = {facts.head_name, facts.head_bias_name}
        return {p: t for p, t in tensor_names(facts, self._checkpoints[name]).items() if p not in head}

    def _body(self, name: str) -> dict[str, Tensor]:
        """Weights of the body: the follower's where there is one, else those of the checkpoint."""
        follower, checkpoint = self._sources[name].follower, self._checkpoints[name]
        tensors = self._body_tensors(name)
        if follower is not None:
            # Buffers do not move with the student: those of the skeleton are the folder's.
            return {p: self._converted(name, follower.tensors[p]) for p in tensors if p in follower.tensors}
        parameters = {tensor: parameter for parameter, tensor in tensors.items()}
        read = self._reader.read(checkpoint, list(parameters), self._device)
        weights = {parameters[tensor]: self._converted(name, values) for tensor, values in read}
        self.bytes_read += checkpoint.header_bytes + self._reader.num_bytes(checkpoint, list(parameters))
        return weights

    def _converted(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.to(device=self._device, dtype=DTYPES[self._sources[name].dtype])

    def _skeleton(self, name: str) -> PreTrainedModel:
        """Teachers with the same config and dtype share one skeleton; it weighs nothing between turns."""
        source = self._sources[name]
        key = (source.model / "config.json").read_text(encoding="utf-8"), source.dtype
        if key not in self._skeletons:
            self._skeletons[key] = build_skeleton(source.model, self._device, DTYPES[source.dtype])
        return self._skeletons[key]
