"""What is kept of a teacher between its turn and the updates, and how an update gets to see it.

Hidden states where its whole distribution is needed; its own top k, or the written token's log-probability,
where that is all that the loss asks for: a few numbers a token, and no head while the student is updated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mergeopd.batch.packing import Pack
from mergeopd.engine.build import Parts
from mergeopd.loss.buffers import Workspace
from mergeopd.loss.heads import Head, Hidden
from mergeopd.loss.observe import observe
from mergeopd.loss.targets import Sampled, Target, TopK
from mergeopd.recipe.loss_terms import Loss
from mergeopd.teacher.hidden_cache import RoundCache
from mergeopd.teacher.token_view import Alignments

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
    """What a round's teachers left; `kept` None where none was asked.

    `alignments` has what teachers with other tokenizers read.
    """

    cache: RoundCache
    kept: Kept | None
    alignments: Alignments = field(default_factory=dict)

    def kept_of(self, parts: Parts, teacher: str) -> Kept:
        """What is kept of a teacher: `kept`, or what its bridge needs. ValueError where none was asked."""
        if self.kept is None:
            raise ValueError(f"teacher {teacher!r} was not asked")
        crossing = parts.inputs.crossings.get(teacher)
        if crossing is None:
            return self.kept
        return Kept("sampled" if crossing.bridge.kind == "span" else "hidden", 1.0)

    def targets(self, parts: Parts, pack: Pack) -> dict[str, Target]:
        """The pack's teachers as the kernel wants them, by name; heads of all other teachers are dropped.

        Of a teacher with another tokenizer the hidden states have a row for each of its own tokens; one whose
        bridge is a policy term is not here (`spans`). Nothing where this process computes no losses; heads
        are cut to the token ids that it scores.

        Raises TeacherError for a teacher whose head shows that it is another model than its card says.
        """
        if self.kept is None or not parts.student.place.has_loss:
            return {}
        kinds = {name: self.kept_of(parts, name).kind for name in pack.teachers}
        heads = parts.store.heads([n for n, kind in kinds.items() if kind == "hidden"], parts.head_rows)
        for name, head in heads.items():
            parts.canaries.verify(name, head)
        found: dict[str, Target] = {}
        for name, kind in kinds.items():
            read = self._read(name, pack)
            if name in self.alignments and (kind != "hidden" or not read):
                continue
            rows = self.cache.gather(name, read)
            if kind == "hidden":
                found[name] = Hidden(rows, heads[name])
            else:
                found[name] = (TopK if kind == "top_k" else Sampled).unpack(rows)
        return found

    def spans(self, parts: Parts, pack: Pack) -> dict[str, Tensor]:
        """Log-probabilities of their own tokens under the pack's teachers whose bridge is a policy term."""
        if self.kept is None:
            return {}
        return {
            name: Sampled.unpack(self.cache.gather(name, self._read(name, pack))).logprob
            for name in pack.teachers
            if name in self.alignments
            and self.kept_of(parts, name).kind == "sampled"
            and self._read(name, pack)
        }

    def _read(self, teacher: str, pack: Pack) -> Sequence[int]:
        """The pack's answers that a teacher has read: not those without a token that both know."""
        own = self.alignments.get(teacher)
        return pack.rollouts if own is None else [i for i in pack.rollouts if len(own[i].teacher_ids)]
