"""Teachers live on disk; one is in memory during its turn and gone after it. Those that follow the student
live in memory.

Weights are read tensor by tensor from memory-mapped safetensors. On a CPU, where the file already has the
computing precision, nothing is copied: the pages belong to the file cache, not to the process. A teacher's
prediction head is not part of its turn; the update fetches it, keyed by checkpoint, so teachers that share
one checkpoint share one head.
"""

from __future__ import annotations

import os
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

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Checkpoint fingerprint; rule and version of weights that follow the student; dtype; true vocabulary.
_HeadKey = tuple[str, tuple[str, int] | None, str, int]


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

    `bytes_read` counts checkpoint bytes brought in: headers and tensors of every turn, and every head.
    """

    def __init__(self, sources: Mapping[str, TeacherSource], device: torch.device) -> None:
        self._sources = dict(sources)
        self._device = device
        self._checkpoints = {name: Checkpoint.open(s.model) for name, s in self._sources.items()}
        self._facts = {name: ModelFacts.read(s.model) for name, s in self._sources.items()}
        self._skeletons: dict[str, PreTrainedModel] = {}
        self._heads: dict[_HeadKey, Head] = {}
        self.bytes_read = 0
        for name, checkpoint in self._checkpoints.items():
            check_fit(self._skeleton(name), self._facts[name], checkpoint)

    @contextmanager
    def open(self, name: str) -> Iterator[LoadedTeacher]:
        """Bring a teacher's body in; it is dropped when the context ends."""
        facts, checkpoint = self._facts[name], self._checkpoints[name]
        model = self._skeleton(name)
        head = {facts.head_name, facts.head_bias_name}
        body = {p: t for p, t in tensor_names(facts, checkpoint).items() if p not in head}
        try:
            fill(
                model, {parameter: self._read(name, parameter, tensor) for parameter, tensor in body.items()}
            )
            self.bytes_read += 0 if self._sources[name].follower else checkpoint.header_bytes
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
        if not hasattr(os, "posix_fadvise") or self._sources[name].follower is not None:
            return
        for file in sorted({info.file for info in self._checkpoints[name].tensors.values()}):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)

    def heads(self, names: Iterable[str], vocab: range | None = None) -> dict[str, Head]:
        """The prediction heads of these teachers; heads of all others are dropped."""
        wanted = {name: self._head_key(name) for name in names}
        self._heads = {key: head for key, head in self._heads.items() if key in wanted.values()}
        for name, key in wanted.items():
            if key not in self._heads:
                self._heads[key] = self._load_head(name)
        return {name: self._heads[key] for name, key in wanted.items()}

    def _head_key(self, name: str) -> _HeadKey:
        source, follower = self._sources[name], self._sources[name].follower
        # A follower's weights are never the folder's, nor its own of another round.
        moved = None if follower is None else (follower.label, follower.version)
        return self._checkpoints[name].fingerprint, moved, source.dtype, source.num_valid

    def _load_head(self, name: str) -> Head:
        facts, checkpoint = self._facts[name], self._checkpoints[name]
        parameter = facts.embedding_name if facts.tied else facts.head_name
        bias = facts.head_bias_name
        return Head(
            weight=self._read(name, parameter, head_tensor(facts, checkpoint)),
            bias=self._read(name, bias, bias) if bias else None,
            scale=facts.logit_scale,
            softcap=facts.softcap,
            num_valid=self._sources[name].num_valid,
        )

    def _read(self, name: str, parameter: str, tensor_name: str) -> Tensor:
        """A parameter's weights: the follower's where there is one, else the tensor of the checkpoint."""
        source, checkpoint = self._sources[name], self._checkpoints[name]
        if source.follower is not None:
            tensor = source.follower.tensors[parameter]
        else:
            tensor = checkpoint.read(tensor_name)
            self.bytes_read += checkpoint.tensors[tensor_name].num_bytes
        return tensor.to(device=self._device, dtype=DTYPES[source.dtype])

    def _skeleton(self, name: str) -> PreTrainedModel:
        """Teachers with the same config share one skeleton; it weighs nothing between turns."""
        folder = self._sources[name].model
        config = (folder / "config.json").read_text(encoding="utf-8")
        if config not in self._skeletons:
            self._skeletons[config] = build_skeleton(folder, self._device)
        return self._skeletons[config]
