"""Stand-ins of a simulated rank for what computes with tensors, and for the other ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergeopd.batch.micro_batch import MicroBatch
from mergeopd.distributed import communicator
from mergeopd.distributed.communicator import Communicator
from mergeopd.distributed.exchange import HEAD_BYTES, Packed, size_of, steps, unpacked
from mergeopd.loss.cross_tokenizer import BridgeStats
from mergeopd.loss.heads import Head
from mergeopd.rollout.protocol import Completion, EngineContext, GenerationRequest
from mergeopd.student.loss import MicroStats
from mergeopd.student.protocol import Placement
from mergeopd.teacher.protocol import LOCAL, TargetSpec, TeacherSequence
from mergeopd.types import Sampling


class SimulatedCommunicator(Communicator):
    """One of `size` ranks, whose collectives return what `peer(rank, own value)` says of the others.

    What other ranks send is pickled and read as between processes. `traffic` counts the bytes and the
    collectives; `outside_s` are the seconds in which this process did other ranks' work, `teacher` is the one
    that was opened last.
    """

    outside_collective = True

    def __init__(self, rank: int, size: int, machine_size: int) -> None:
        self.rank, self.size = rank, size
        self.machines = tuple(f"machine-{r // machine_size}" for r in range(size))
        self.peer: Callable[[int, Any], Any] = lambda rank, own: own
        self.traffic = Traffic()
        self.outside_s = 0.0
        self.teacher = ""

    def gather(self, value: Any) -> list[Any]:
        packed = []
        with self._outside():
            for rank in range(self.size):
                packed.append(_Sent.of(value if rank == self.rank else self.peer(rank, value)))
        self.traffic.add([size_of(one.head) for one in packed], self.rank)
        return [value if rank == self.rank else one.read() for rank, one in enumerate(packed)]

    def run_on_first(self, work: Callable[[], Any]) -> Any:
        value = work()
        sizes = [size_of(Packed.of(value).head), *(0 for _ in range(1, self.size))]
        self.traffic.add(sizes, self.rank)
        return value

    def run_and_gather(self, work: Callable[[], Any]) -> list[Any]:
        return self.gather(work())

    def send(self, tensor: Tensor, rank: int) -> None:
        self.traffic.sent += tensor.nbytes

    def receive(self, tensor: Tensor, rank: int) -> None:
        self.traffic.received += tensor.nbytes
        tensor.zero_()

    @contextmanager
    def _outside(self) -> Iterator[None]:
        start = time.process_time()
        yield
        self.outside_s += time.process_time() - start


@dataclass
class Traffic:
    """Collectives of this rank, and its bytes."""

    collectives: int = 0
    sent: int = 0
    received: int = 0

    def add(self, sizes: Sequence[int], rank: int) -> None:
        """Count an exchange of so many bytes of each rank beside the heads."""
        moves = list(steps(sizes, communicator.PART_BYTES))
        self.collectives += 1 + len(moves)
        self.sent += sizes[rank]
        self.received += len(sizes) * HEAD_BYTES
        for move in moves:
            self.received += move.num_bytes * (len(sizes) if move.sender is None else 1)


@dataclass(frozen=True)
class _Sent:
    """An object of another rank: its bytes as they arrive."""

    head: bytes
    content: Any

    @classmethod
    def of(cls, value: Any) -> _Sent:
        packed = Packed.of(value)
        content = np.empty(packed.num_bytes, np.uint8)
        packed.copy_to(content, 0)
        return cls(packed.head, content)

    def read(self) -> Any:
        return unpacked(self.content.data)


@dataclass(frozen=True)
class SimulatedEngine:
    """A rollout engine whose responses have random letters as tokens, and lengths around `tokens`."""

    ranks: SimulatedCommunicator
    context: EngineContext
    tokens: int
    letters: Sequence[int]

    def submit(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> SimpleNamespace:
        return SimpleNamespace(wait=lambda on_progress: self._all(requests))

    def sync_weights(self, source: Any, version: int) -> None:
        pass

    def close(self) -> None:
        pass

    def _all(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        size = self.ranks.size

        def of_rank(rank: int, own: Any) -> list[Completion]:
            return self._completions(requests[rank::size], rank)

        with peers(self.ranks, of_rank):
            return self.context.deal(requests, lambda own: self._completions(own, self.ranks.rank))

    def _completions(self, requests: Sequence[GenerationRequest], seed: int) -> list[Completion]:
        rng, letters = np.random.default_rng(seed), np.array(self.letters, np.int32)
        lengths = rng.integers(self.tokens // 2, self.tokens + self.tokens // 2, len(requests))
        return [
            Completion(
                np.append(rng.choice(letters, n - 1), np.int32(self.context.eos_ids[0])),  # type: ignore[index]
                -rng.random(n, np.float32),
                "eos",
            )
            for n in lengths
        ]


@contextmanager
def peers(ranks: SimulatedCommunicator, peer: Callable[[int, Any], Any]) -> Iterator[None]:
    """Let the other ranks of collectives inside send what `peer` returns."""
    before, ranks.peer = ranks.peer, peer
    try:
        yield
    finally:
        ranks.peer = before


@dataclass
class SimulatedTeacher:
    """A teacher with one hidden number per token."""

    name: str
    ranks: SimulatedCommunicator
    num_rows: int
    fingerprint: str = "simulated"
    bytes_read: int = 0
    capabilities: Any = LOCAL

    @property
    def head_key(self) -> str:
        return self.name

    @contextmanager
    def open(self) -> Iterator[SimulatedTeacher]:
        self.ranks.teacher = self.name
        yield self

    def prefetch(self) -> None:
        pass

    def head(self, vocab: range | None) -> Head:
        return Head(torch.zeros(self.num_rows if vocab is None else len(vocab), 1))

    def score(
        self, sequences: Sequence[TeacherSequence], spec: TargetSpec, max_tokens: int
    ) -> Iterator[tuple[int, Tensor]]:
        for i, sequence in enumerate(sequences):
            yield i, torch.zeros(sequence.num_trained, 1)


@dataclass
class SimulatedStudent:
    """A student whose statistics are constants."""

    placement: Placement
    vocab: range
    statistics_dtype: torch.dtype = torch.float32

    def accumulate_gradients(
        self, micro_batches: Any, objective: Any, observe: Any = None
    ) -> list[MicroStats]:
        return [_stats(micro, len(objective.divergences)) for micro in micro_batches]

    def score(self, micro_batches: Any, what: Any) -> list[MicroStats]:
        return [_stats(micro, len(what.divergences)) for micro in micro_batches]

    def optimizer_step(self, lr: float) -> float:
        return 1.0


def _stats(micro: MicroBatch, num_divergences: int) -> MicroStats:
    num_teachers, num_tokens = len(micro.teachers), sum(map(len, micro.labels))
    token, of_teacher = torch.full((num_tokens,), -0.5), torch.full((num_teachers, num_tokens), 0.5)
    bridged = []
    for one in micro.bridged:
        rows = torch.full((len(one.weight_G),), 0.5)
        bridged.append((one.teacher, BridgeStats(rows, -rows, -rows, rows, rows, rows)))
    return MicroStats(
        divergence=torch.full((num_teachers, num_divergences, num_tokens), 0.5),
        logprob_S=token,
        logprob_T=-of_teacher,
        entropy_S=-token,
        entropy_T=of_teacher,
        loss=-token,
        bridged=tuple(bridged),
    )


def placement(rank: int, size: int, tensor: int) -> Placement:
    """The grid of `size` ranks in copies of `tensor`."""
    copies = tuple(tuple(range(first, first + tensor)) for first in range(0, size, tensor))
    return Placement(rank // tensor, copies, copies, has_loss=True, reports_stats=rank % tensor == 0)
