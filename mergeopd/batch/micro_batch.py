"""Micro-batches: the input of a student backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from torch import Tensor

from mergeopd.loss.cross_tokenizer import Bridge, Groups
from mergeopd.loss.heads import Hidden
from mergeopd.loss.policy import PolicyRows
from mergeopd.loss.targets import Target
from mergeopd.types import Flags, Routes, TokenIds


@dataclass(frozen=True, slots=True)
class BridgedTarget:
    """A teacher with another tokenizer, on the responses of one micro-batch.

    `target` has a row for each of the teacher's tokens, whose ids are `labels`; `groups` maps the rows of
    both sides to groups, and `weight_G` contains all factors and denominators.
    """

    teacher: str
    target: Hidden
    labels: Tensor
    groups: Groups
    measure: Bridge
    weight_G: Tensor


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Responses that share one set of teachers; N is the number of their trained tokens, in order.

    `targets` has one entry per teacher (K). `teacher_weight_KN`, `nll_weight_N` and `policy` contain all
    factors and denominators, so the loss of an update is the plain sum over its micro-batches.
    `term_weight_KDN` has the weights by divergence (D) where terms have teachers of their own. `policy` is
    None where the objective has no policy term. `bridged` are the teachers with other tokenizers. `trained`
    flags the tokens of each response that are in the loss; None, as a whole or for a response: all of them.
    `overlap_rows` are the tokens whose overlap is measured, ascending, on the CPU; None: it is not measured.
    `routes` has the experts that computed a sequence when its response was generated, where they are to
    compute it again; empty, or None for a sequence: its tokens choose their experts.
    """

    rollouts: tuple[int, ...]
    teachers: tuple[str, ...]
    prompts: tuple[TokenIds, ...]
    responses: tuple[TokenIds, ...]
    targets: tuple[Target, ...]
    teacher_weight_KN: Tensor
    nll_weight_N: Tensor
    policy: PolicyRows | None = None
    trained: tuple[Flags | None, ...] | None = None
    bridged: tuple[BridgedTarget, ...] = ()
    term_weight_KDN: Tensor | None = None
    overlap_rows: Tensor | None = None
    routes: tuple[Routes | None, ...] = ()

    @property
    def labels(self) -> tuple[TokenIds, ...]:
        """Token ids of each response that are in the loss."""
        flags = self.trained or (None,) * len(self.responses)
        pairs = zip(self.responses, flags, strict=True)
        return tuple(response if own is None else response[own] for response, own in pairs)

    def with_teacher_names(self, error: ArithmeticError) -> str:
        """Return the message of the kernel's error, with the names of its targets."""
        names = ", ".join(f"{k} = {name}" for k, name in enumerate(self.teachers))
        return f"{error} (targets: {names or 'none'})"


S = TypeVar("S")


class MicroBatches(Protocol):
    """Micro-batches in order, with their number."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[MicroBatch]: ...


@dataclass(frozen=True, eq=False)
class Stream:
    """`count` micro-batches from an iterator; can be iterated once."""

    micro_batches: Iterable[MicroBatch]
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.micro_batches)


def with_statistics(
    micro_batches: MicroBatches, work: Callable[[MicroBatches], Sequence[S]]
) -> list[tuple[MicroBatch, S]]:
    """Return each micro-batch, without its targets, with the statistics that `work` returns for it.

    Targets are not kept longer than `work` keeps them. Empty where `work` returns no statistics.
    """
    taken: list[MicroBatch] = []

    def recorded() -> Iterator[MicroBatch]:
        for micro in micro_batches:
            taken.append(replace(micro, targets=(), bridged=()))
            yield micro

    stats = work(Stream(recorded(), len(micro_batches)))
    return list(zip(taken, stats, strict=True)) if stats else []
