"""Teachers from local checkpoints, in memory only during their pass, and teachers from student snapshots.

A `Reader` reads a body's weights. By default they are memory-mapped safetensors: on a CPU, if the file has
the computing precision, nothing is copied, and the pages belong to the file cache, not to the process. A
teacher's prediction head is not part of its pass; the update reads it, whole or some of its rows, keyed by
checkpoint, so teachers that share one checkpoint share one head.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mergeopd.batch.packing import length_batches
from mergeopd.loss.heads import Head
from mergeopd.models.causal import (
    DTYPES,
    assembled,
    build_skeleton,
    check_fit,
    empty,
    fill,
    head_of,
    parameter_parts,
    response_hidden,
)
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.decode import decoded
from mergeopd.models.experts import Part
from mergeopd.models.facts import ModelFacts, head_tensor
from mergeopd.models.residency import WINDOW, Held, by_layer, is_copied
from mergeopd.models.stored import StoredWeight, stored_weights
from mergeopd.rollout.local import FixedWeights
from mergeopd.rollout.protocol import ReplicaSource, RolloutEngine
from mergeopd.storage.quantized import Quantization
from mergeopd.teacher.canary import Canary
from mergeopd.teacher.protocol import (
    TargetSpec,
    Teacher,
    TeacherCapabilities,
    TeacherSequence,
    TeacherSession,
)
from mergeopd.teacher.scoring import FiniteCheck, reduced, rows_of
from mergeopd.teacher.snapshots import Snapshot
from mergeopd.teacher.streaming.session import StreamedSession
from mergeopd.teacher.streaming.weights import Assemble, StreamedWeights
from mergeopd.teacher.weight_reader import MappedReader, Reader, ShardedReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_log = logging.getLogger(__name__)
MakeEngine = Callable[[ReplicaSource], RolloutEngine]


@dataclass(frozen=True, slots=True)
class TeacherSource:
    """A teacher's model folder, dtype and true vocabulary (`num_valid`).

    With a `snapshot`, the folder gives the architecture only, and the weights are the snapshot's. Without
    `has_body`, only the prediction head is used, and the folder need not have more.
    """

    model: Path
    dtype: str
    num_valid: int
    snapshot: Snapshot | None = None
    has_body: bool = True


@dataclass(eq=False)
class LocalSession:
    """A teacher whose body is in memory, and its whole prediction head from its first use on."""

    name: str
    body: nn.Module
    device: torch.device
    read_head: Callable[[], Head]
    make_engine: MakeEngine | None

    @cached_property
    def head(self) -> Head:
        return self.read_head()

    @torch.no_grad()
    def hidden(self, sequences: Sequence[TeacherSequence], max_tokens: int) -> Iterator[tuple[int, Tensor]]:
        """Yield `(index, [trained tokens, d_T])` for every sequence, in batches of at most `max_tokens`.

        Raises TeacherError at the end when a hidden state is not finite.
        """
        check = FiniteCheck(self.name)
        for batch in length_batches([sequence.num_tokens for sequence in sequences], max_tokens):
            own = [sequences[i] for i in batch]
            states = response_hidden(
                self.body,
                [sequence.prompt_ids for sequence in own],
                [sequence.response_ids for sequence in own],
                self.device,
                [sequence.trained for sequence in own],
            )
            check.add(states)
            yield from rows_of(states, batch, sequences)
        check.end()

    def score(
        self, sequences: Sequence[TeacherSequence], spec: TargetSpec, max_tokens: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield `(index, [trained tokens, width])` for every sequence; see `TeacherSession.score`.

        Raises TeacherError when a hidden state is not finite.
        """
        states = self.hidden(sequences, max_tokens)
        if spec.kind == "hidden":
            return states
        return reduced(self.name, states, sequences, self.read_head, spec)

    def generator(self) -> RolloutEngine:
        assert self.make_engine is not None, "opened without an engine"
        return self.make_engine(FixedWeights(self.body, lambda: self.head))


@dataclass(eq=False)
class LocalTeacher:
    """A teacher whose weights are in a local folder, or are a snapshot of the student's.

    `canary` is verified the first time that the teacher is opened, on rank 0 (`run_on_first`). `make_engine`
    builds an engine that generates with a model's weights and this teacher's end tokens. Where it is `held`
    streamed, its body is loaded only to generate. `quantization` is how far its weights are from those of its
    card, if the recipe quantises them.
    """

    name: str
    store: TeacherStore
    capabilities: TeacherCapabilities
    canary: Canary | None
    run_on_first: Callable[[Callable[[], None]], None]
    make_engine: MakeEngine
    held: Held | None = None
    is_first: bool = True
    quantization: Quantization | None = None

    @property
    def fingerprint(self) -> str | None:
        return self.store.fingerprint(self.name)

    @property
    def bytes_read(self) -> int:
        return self.store.bytes_read(self.name)

    @property
    def head_key(self) -> Hashable:
        return self.store.head_key(self.name)

    def open(self) -> AbstractContextManager[LocalSession | StreamedSession]:
        """Load the body, or prepare to stream it; it is freed when the context ends. Collective.

        Raises TeacherError when the canary does not match; a streamed one is verified when it first scores.
        """
        if self._pass_tokens is None:
            return self._loaded()
        return self.store.stream(self.name, self._pass_tokens, self._take_canary, self._loaded)

    @property
    def _pass_tokens(self) -> int | None:
        return None if self.held is None else self.held.pass_tokens

    @contextmanager
    def _loaded(self) -> Iterator[LocalSession]:
        with self.store.open(self.name, self.make_engine) as session:
            if self.canary is not None:
                canary, self.canary = self.canary, None
                self.run_on_first(partial(self._verify, canary, session))
            yield session

    def _verify(self, canary: Canary, session: LocalSession) -> None:
        # In a batch of its own, so that the batches of other sequences do not change.
        [(_, hidden)] = session.hidden([canary.sequence], canary.sequence.num_tokens)
        canary.verify(hidden, session.head)

    def _take_canary(self) -> Canary | None:
        """Return the canary to the session that verifies it; None afterwards, and on other ranks."""
        canary, self.canary = self.canary, None
        return canary if self.is_first else None

    def prefetch(self) -> None:
        self.store.read_ahead(self.name, WINDOW if self._pass_tokens is not None else None)

    def head(self, vocab: range | None) -> Head:
        return self.store.head(self.name, vocab)


@dataclass(eq=False)
class ResidentHeads:
    """The prediction heads in memory: those of one set of teachers at a time, equal ones only once.

    `vocab_of`: a teacher's token ids whose rows this process scores; None: all.
    """

    teachers: Mapping[str, Teacher]
    vocab_of: Callable[[str], range | None]
    _heads: dict[Hashable, Head] = field(init=False, default_factory=dict)

    def of(self, names: Iterable[str]) -> dict[str, Head]:
        """Return the heads of these teachers and free all others."""
        wanted = {name: self.teachers[name].head_key for name in names}
        self._heads = {key: head for key, head in self._heads.items() if key in wanted.values()}
        for name, key in wanted.items():
            if key not in self._heads:
                self._heads[key] = self.teachers[name].head(self.vocab_of(name))
        return {name: self._heads[key] for name, key in wanted.items()}

    def release(self) -> None:
        self._heads = {}


class TeacherStore:
    """All teachers of a run, by name. Raises ModelError when a checkpoint does not fit its config.

    `reader` is memory-mapped by default. Bytes read are headers and this process's part of the tensors of
    every pass, and every head or its rows.
    """

    def __init__(
        self, sources: Mapping[str, TeacherSource], device: torch.device, reader: Reader | None = None
    ) -> None:
        self._sources = dict(sources)
        self._device = device
        self._reader = MappedReader() if reader is None else reader
        self._checkpoints = {name: Checkpoint.open(s.model) for name, s in sources.items()}
        self._facts = {
            name: ModelFacts.read(s.model, "readable" if s.has_body else "any") for name, s in sources.items()
        }
        self._skeletons: dict[tuple[str, str], PreTrainedModel] = {}
        self._bytes_read = Counter[str]()
        for name, checkpoint in self._checkpoints.items():
            if sources[name].has_body:
                check_fit(self._skeleton(name), self._facts[name], checkpoint)

    @contextmanager
    def open(self, name: str, make_engine: MakeEngine | None = None) -> Iterator[LocalSession]:
        """Load a teacher's body; it is freed when the context ends. Collective if the reader is."""
        model = self._skeleton(name)
        try:
            fill(model, self._body(name))
            head = partial(self.head, name)
            yield LocalSession(name, model.base_model, self._device, head, make_engine)
        finally:
            empty(model)

    @contextmanager
    def stream(
        self,
        name: str,
        pass_tokens: int,
        take_canary: Callable[[], Canary | None],
        load: Callable[[], AbstractContextManager[TeacherSession]],
    ) -> Iterator[StreamedSession]:
        """Open a teacher whose layers are read while it scores; see `StreamedSession`."""
        model, parts, dtype = self._skeleton(name), self._body_parts(name), self._sources[name].dtype
        copy = is_copied(self._facts[name], self._checkpoints[name], dtype)

        def count(num_bytes: int) -> None:
            self._bytes_read[name] += num_bytes

        weights = StreamedWeights(
            self._checkpoints[name],
            self._body_tensors(name),
            parts[self._facts[name].embedding_name][0].tensor,
            model.base_model_prefix,
            self._assembler(name, copy=copy),
            copy,
            count,
        )
        with ExitStack() as opened:
            yield StreamedSession(
                name,
                model.base_model,
                weights,
                self._device,
                self._reader.ranks,
                pass_tokens,
                partial(self.head, name),
                take_canary,
                load,
                opened,
            )

    def fingerprint(self, name: str) -> str | None:
        return None if self._sources[name].snapshot is not None else self._checkpoints[name].fingerprint

    def bytes_read(self, name: str) -> int:
        return self._bytes_read[name]

    def read_ahead(self, name: str, num_layers: int | None = None) -> None:
        """Start reading a teacher's files into the system's file cache; no memory of the process is used.

        Of a streamed teacher, whose body may be larger than the cache, the first `num_layers`.
        """
        if self._sources[name].snapshot is not None:
            return
        checkpoint, tensors = self._checkpoints[name], self._body_tensors(name)
        if num_layers is None:
            self._reader.read_ahead(checkpoint, tensors)
        else:
            groups = by_layer(tensors)
            first = [tensor for layer in range(num_layers) for tensor in groups.get(layer, ())]
            ShardedReader(self._reader.ranks).read_ahead(checkpoint, first)

    def head_key(self, name: str) -> Hashable:
        """Equal for teachers whose heads are equal: one checkpoint, precision and true vocabulary."""
        source = self._sources[name]
        snapshot = source.snapshot
        # A snapshot's weights differ from the folder's and from its own of another round.
        moved = None if snapshot is None else (snapshot.label, snapshot.version)
        return self._checkpoints[name].fingerprint, moved, source.dtype, source.num_valid

    def head(self, name: str, vocab: range | None = None) -> Head:
        """Read a teacher's prediction head. Not collective.

        With `vocab`, read only the rows of these token ids, as one rank of a tensor-parallel group needs
        them. Raises ValueError for ids outside the teacher's true vocabulary.
        """
        facts, checkpoint = self._facts[name], self._checkpoints[name]
        num_valid = self._sources[name].num_valid
        if vocab is not None and not (vocab.step == 1 and 0 <= vocab.start <= vocab.stop <= num_valid):
            raise ValueError(f"teacher {name!r} has {num_valid} true tokens, which do not cover {vocab}")
        tensors = {facts.head_parameter: head_tensor(facts, checkpoint)}
        if facts.head_bias_name:
            tensors[facts.head_bias_name] = facts.head_bias_name
        rows = {p: self._head_rows(name, p, tensor, vocab) for p, tensor in tensors.items()}
        return head_of(facts, rows, range(num_valid) if vocab is None else vocab)

    def _head_rows(self, name: str, parameter: str, tensor_name: str, vocab: range | None) -> Tensor:
        """Rows of the snapshot's parameter if there is one, else of the checkpoint's tensor."""
        snapshot, checkpoint = self._sources[name].snapshot, self._checkpoints[name]
        info = checkpoint.tensors[tensor_name]
        rows = range(info.shape[0]) if vocab is None else vocab
        if snapshot is not None:
            return self._converted(name, snapshot.tensors[parameter][rows.start : rows.stop])
        self._bytes_read[name] += info.num_bytes * len(rows) // info.shape[0]
        return self._converted(name, checkpoint.read_slice(tensor_name, rows.start, rows.stop))

    def _body_parts(self, name: str) -> dict[str, tuple[Part, ...]]:
        facts = self._facts[name]
        head = {facts.head_name, facts.head_bias_name}
        parts = parameter_parts(facts, self._checkpoints[name])
        return {parameter: own for parameter, own in parts.items() if parameter not in head}

    def _body_weights(self, name: str) -> dict[str, StoredWeight]:
        stored = stored_weights(self._facts[name], self._checkpoints[name])
        return {part.tensor: stored[part.tensor] for own in self._body_parts(name).values() for part in own}

    def _body_tensors(self, name: str) -> list[str]:
        return [tensor for own in self._body_weights(name).values() for tensor in own.tensors.values()]

    def _body(self, name: str) -> dict[str, Tensor]:
        source, checkpoint, parts = self._sources[name], self._checkpoints[name], self._body_parts(name)
        if (snapshot := source.snapshot) is not None:
            # Buffers do not change with the student: the skeleton's are the folder's.
            return {p: self._converted(name, snapshot.tensors[p]) for p in parts if p in snapshot.tensors}
        tensors = self._body_tensors(name)
        weights = dict(self._assembler(name)(self._reader.read(checkpoint, tensors, self._device)))
        num_bytes = checkpoint.header_bytes + self._reader.num_bytes(checkpoint, tensors)
        _log.debug("read %d bytes of teacher %s", num_bytes, name)
        self._bytes_read[name] += num_bytes
        return weights

    def _assembler(self, name: str, *, copy: bool = False) -> Assemble:
        """Return a function that yields parameters of a body, each when its last tensor has come.

        With `copy`, none is a view of a tensor.
        """
        parts, weights = self._body_parts(name), self._body_weights(name)
        dtype, device = DTYPES[self._sources[name].dtype], self._device
        return lambda tensors: assembled(
            parts, decoded(weights, tensors, dtype, device, copy=copy), device, dtype, copy=copy
        )

    def _converted(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.to(device=self._device, dtype=DTYPES[self._sources[name].dtype])

    def _skeleton(self, name: str) -> PreTrainedModel:
        """Share one skeleton among teachers with the same config and dtype; empty between passes."""
        source = self._sources[name]
        key = (source.model / "config.json").read_text(encoding="utf-8"), source.dtype
        if key not in self._skeletons:
            self._skeletons[key] = build_skeleton(source.model, self._device, DTYPES[source.dtype])
        return self._skeletons[key]
