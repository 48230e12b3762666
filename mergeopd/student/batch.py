"""What a student backend gets to see of an update."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from mergeopd.loss.fused import TokenStats
from mergeopd.loss.policy import PolicyRows
from mergeopd.loss.targets import Target


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Answers that share one set of teachers; N is the number of their trained tokens, in order.

    `targets` holds one entry per teacher (K), `teacher_weight_KN`, `nll_weight_N` and `policy` carry every
    factor and denominator, so the loss of an update is the plain sum over its micro-batches. `policy` is
    None where the objective has no policy term. `trained` has flags for the tokens of each response; None, as
    a whole or for a response: all of them are in the loss.
    """

    rollouts: tuple[int, ...]
    teachers: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...]
    targets: tuple[Target, ...]
    teacher_weight_KN: Tensor
    nll_weight_N: Tensor
    policy: PolicyRows | None = None
    trained: tuple[tuple[bool, ...] | None, ...] | None = None

    @property
    def labels(self) -> tuple[tuple[int, ...], ...]:
        """The trained tokens of each response."""
        if self.trained is None:
            return self.responses
        return tuple(
            response if flags is None else tuple(i for i, own in zip(response, flags, strict=True) if own)
            for response, flags in zip(self.responses, self.trained, strict=True)
        )

    def blamed(self, error: ArithmeticError) -> str:
        """The kernel's complaint with the names of its targets."""
        names = ", ".join(f"{k} = {name}" for k, name in enumerate(self.teachers))
        return f"{error} (targets: {names or 'none'})"


def with_statistics(
    micros: Iterable[MicroBatch], work: Callable[[Iterator[MicroBatch]], Iterable[TokenStats]]
) -> Iterator[tuple[MicroBatch, TokenStats]]:
    """Each micro-batch with what a student's `accumulate` or `score` found of it, in order.

    `work` takes the micro-batches one by one or all at first, as the student likes; one that has been told
    is held no longer than the student holds it.
    """
    taken: deque[MicroBatch] = deque()

    def remembered() -> Iterator[MicroBatch]:
        for micro in micros:
            taken.append(micro)
            yield micro

    for stats in work(remembered()):
        yield taken.popleft(), stats
