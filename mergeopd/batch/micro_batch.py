"""What a student backend gets to see of an update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from torch import Tensor

from mergeopd.loss.cross_tokenizer import Bridge, Groups
from mergeopd.loss.heads import Hidden
from mergeopd.loss.policy import PolicyRows
from mergeopd.loss.targets import Target
from mergeopd.types import Flags, TokenIds


@dataclass(frozen=True, slots=True)
class BridgedTarget:
    """A teacher with another tokenizer, on the answers of one micro-batch.

    `target` has a row for each of its own tokens, whose ids are `labels`; `groups` says which rows of both
    sides belong together, and `weight_G` carries every factor and denominator.
    """

    teacher: str
    target: Hidden
    labels: Tensor
    groups: Groups
    measure: Bridge
    weight_G: Tensor


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Answers that share one set of teachers; N is the number of their trained tokens, in order.

    `targets` holds one entry per teacher (K), `teacher_weight_KN`, `nll_weight_N` and `policy` carry every
    factor and denominator, so the loss of an update is the plain sum over its micro-batches. `policy` is
    None where the objective has no policy term. `bridged` are the teachers with other tokenizers.
    `trained` has flags for the tokens of each response; None, as a whole or for a response: all of them are
    in the loss.
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

    @property
    def labels(self) -> tuple[TokenIds, ...]:
        """The trained tokens of each response."""
        if self.trained is None:
            return self.responses
        return tuple(
            response if flags is None else response[flags]
            for response, flags in zip(self.responses, self.trained, strict=True)
        )

    def with_teacher_names(self, error: ArithmeticError) -> str:
        """The kernel's complaint with the names of its targets."""
        names = ", ".join(f"{k} = {name}" for k, name in enumerate(self.teachers))
        return f"{error} (targets: {names or 'none'})"


S = TypeVar("S")


class MicroBatches(Protocol):
    """Micro-batches in order; their number is known before the first is made."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[MicroBatch]: ...


class Stream:
    """`count` micro-batches that are made one by one, as they are asked for; to be iterated once."""

    def __init__(self, micro_batches: Iterable[MicroBatch], count: int) -> None:
        self._micros = micro_batches
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self._micros)


def with_statistics(
    micro_batches: MicroBatches, work: Callable[[MicroBatches], Sequence[S]]
) -> list[tuple[MicroBatch, S]]:
    """Each micro-batch, without its targets, with the statistics that a student's method returns for it.

    Targets are held no longer than the student holds them. Empty where the student computes no losses.
    """
    taken: list[MicroBatch] = []

    def remembered() -> Iterator[MicroBatch]:
        for micro in micro_batches:
            taken.append(replace(micro, targets=(), bridged=()))
            yield micro

    stats = work(Stream(remembered(), len(micro_batches)))
    return list(zip(taken, stats, strict=True)) if stats else []
