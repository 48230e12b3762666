"""What is kept of a teacher between its turn and the updates, and how an update gets to see it.

Hidden states where its whole distribution is needed; its own top k, or the written token's log-probability,
where that is all that the loss asks for: a few numbers a token, and no head while the student is updated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergeopd.engine.build import Parts
from mergeopd.engine.schedule import Pack
from mergeopd.loss.heads import Head, Hidden
from mergeopd.loss.observe import observe
from mergeopd.loss.targets import Sampled, Target, TopK
from mergeopd.loss.workspace import Workspace
from mergeopd.recipe.losses import Loss
from mergeopd.teacher.cache import HiddenCache
from mergeopd.teacher.node_cache import NodeCache

Cache = HiddenCache | NodeCache
# Answers are reduced together until they have this many tokens: a matrix product of a few rows is slow.
_ROWS = 256


@dataclass(frozen=True, slots=True)
class Kept:
    """`hidden`: last hidden states; `top_k`: the teacher's k likeliest tokens; `sampled`: the written one."""

    kind: Literal["hidden", "top_k", "sampled"]
    temperature: float
    k: int | None = None


def kept(loss: Loss) -> Kept | None:
    """The least that a loss needs of every teacher; None where it asks none."""
    if not loss.needs_teacher:
        return None
    if not loss.has_divergence:
        return Kept("sampled", loss.temperature)
    if loss.support is not None and loss.support.of == "teacher":
        return Kept("top_k", loss.temperature, loss.support.top_k)
    return Kept("hidden", loss.temperature)


def reduced(
    states: Iterable[tuple[int, Tensor]],
    responses: Sequence[Sequence[int]],
    head: Head,
    what: Kept,
) -> Iterator[tuple[int, Tensor]]:
    """`(index, numbers to keep [response length, w])` for every `(index, hidden states)`, in their order."""
    workspace = Workspace()
    waiting: list[tuple[int, Tensor]] = []

    def flush() -> Iterator[tuple[int, Tensor]]:
        labels = [t for index, _ in waiting for t in responses[index]]
        hidden = torch.cat([rows for _, rows in waiting])
        seen = observe(
            hidden,
            head,
            torch.tensor(labels, device=hidden.device),
            temperature=what.temperature,
            top_k=what.k,
            workspace=workspace,
        )
        parts = torch.split(seen.packed(), [len(rows) for _, rows in waiting])
        for (index, _), part in zip(waiting, parts, strict=True):
            yield index, part.clone()
        waiting.clear()

    for index, rows in states:
        waiting.append((index, rows))
        if sum(len(rows) for _, rows in waiting) >= _ROWS:
            yield from flush()
    if waiting:
        yield from flush()


@dataclass(frozen=True, slots=True)
class Observed:
    """What a round's teachers left; `kept` None where none was asked."""

    cache: Cache
    kept: Kept | None

    def targets(self, parts: Parts, pack: Pack) -> dict[str, Target]:
        """The pack's teachers as the kernel wants them, by name; heads of all other teachers are dropped.

        Nothing where this process computes no losses, and heads are cut to the token ids that it scores.
        Raises TeacherError for a teacher whose head shows that it is another model than its card says.
        """
        if self.kept is None:
            return {}
        if not parts.student.place.has_loss:
            return {}
        rows = {name: self.cache.gather(name, pack.rollouts) for name in pack.teachers}
        if self.kept.kind != "hidden":
            kind = TopK if self.kept.kind == "top_k" else Sampled
            return {name: kind.unpack(matrix) for name, matrix in rows.items()}
        heads = parts.store.heads(pack.teachers, parts.head_rows)
        for name, head in heads.items():
            parts.canaries.verify(name, head)
        return {name: Hidden(rows[name], heads[name]) for name in pack.teachers}
