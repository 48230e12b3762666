"""Interface between the round and its teachers. Importing this does not import torch."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from mergeopd.recipe.loss_terms import Loss
from mergeopd.recipe.plan import TeacherPlan
from mergeopd.types import ArrayRecord, Flags, TokenIds, token_flags, token_ids

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from mergeopd.loss.heads import Head
    from mergeopd.rollout.protocol import RolloutEngine

TargetKind = Literal["hidden", "top_k", "student_top_k", "sampled"]
# Token ids `[trained tokens, k]`. In quotes, so that numpy need not be imported.
SupportIds: TypeAlias = "NDArray[np.int32]"


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """The part of a teacher's output that is kept for every trained token.

    `hidden`: last hidden states `[d_T]`; with `k`, log-probabilities of the student's `k` likeliest tokens
    would do. `top_k`: log-probabilities and ids of its `k` likeliest tokens, its entropy and the
    log-probability of the sampled token. `student_top_k`: the same for the ids of each sequence's `support`.
    `sampled`: only the last two. Log-probabilities are of logits divided by `temperature`.
    """

    kind: TargetKind
    temperature: float = 1.0
    k: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TeacherSequence(ArrayRecord):
    """One response as a teacher reads it: its own rendering of the prompt, its own token ids.

    `trained` has a flag per response token; None: all of them are scored. `support` are the student's
    likeliest ids at each scored token, for `student_top_k`.
    """

    prompt_ids: TokenIds
    response_ids: TokenIds
    trained: Flags | None = None
    support: SupportIds | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", token_ids(self.prompt_ids))
        object.__setattr__(self, "response_ids", token_ids(self.response_ids))
        if self.trained is not None:
            object.__setattr__(self, "trained", token_flags(self.trained))

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def num_trained(self) -> int:
        """Response tokens that are scored."""
        return len(self.response_ids) if self.trained is None else int(self.trained.sum())

    @property
    def trained_ids(self) -> TokenIds:
        """The response tokens that are scored."""
        return self.response_ids if self.trained is None else self.response_ids[self.trained]


@dataclass(frozen=True, slots=True)
class TeacherCapabilities:
    """A teacher's properties that `check` needs before the teacher is opened.

    `any_temperature`: its log-probabilities can be at other temperatures than 1. `is_served`: servers score,
    while this process does something else.
    """

    can_provide: frozenset[TargetKind]
    can_generate: bool
    any_temperature: bool = True
    is_served: bool = False

    def smallest(self, spec: TargetSpec) -> TargetSpec:
        """Return the targets to ask for where a loss needs `spec`: the student's top k may replace states."""
        can_replace = "hidden" not in self.can_provide and "student_top_k" in self.can_provide
        if spec.kind == "hidden" and spec.k is not None and can_replace:
            return TargetSpec("student_top_k", spec.temperature, spec.k)
        return spec


LOCAL = TeacherCapabilities(frozenset(("hidden", "top_k", "sampled")), can_generate=True)
# Its responses would be generated before the phase, with weights that have changed when they are learned.
SNAPSHOT = TeacherCapabilities(LOCAL.can_provide, can_generate=False)
# Each token would read all weights again.
STREAMED = TeacherCapabilities(LOCAL.can_provide, can_generate=False)
TEXT = TeacherCapabilities(frozenset(), can_generate=True)


def capabilities(teacher: TeacherPlan) -> TeacherCapabilities:
    """Return the capabilities of a resolved teacher."""
    if teacher.api is not None:
        return TEXT
    served = teacher.served
    if served is None and teacher.residency == "stream":
        return STREAMED
    if served is None:
        return LOCAL if teacher.snapshot_rule is None else SNAPSHOT
    kinds: set[TargetKind] = {"top_k", "sampled"}
    if served.hidden_states:
        kinds.add("hidden")
    elif served.engine == "vllm":
        kinds.add("student_top_k")
    return TeacherCapabilities(
        frozenset(kinds), can_generate=False, any_temperature=served.hidden_states, is_served=True
    )


def required_target(loss: Loss) -> TargetSpec | None:
    """Return the smallest target that a loss needs of every teacher; None where it needs no teacher."""
    if not loss.needs_teacher:
        return None
    if not loss.has_divergence:
        return TargetSpec("sampled", loss.temperature)
    if loss.support is not None and loss.support.of == "teacher":
        return TargetSpec("top_k", loss.temperature, loss.support.top_k)
    of_student = loss.support is not None and loss.support.of == "student"
    return TargetSpec("hidden", loss.temperature, loss.support.top_k if of_student and loss.support else None)


def required_kind(loss: Loss, teacher: TeacherPlan, own: TeacherCapabilities) -> TargetKind | None:
    """The kind of target that a loss needs of one teacher; None where it needs no teacher."""
    spec = required_of(loss, teacher)
    return None if spec is None else (own.smallest(spec) if teacher.bridge is None else spec).kind


def required_of(loss: Loss, teacher: TeacherPlan) -> TargetSpec | None:
    """Return the smallest target that a loss needs of one teacher; None where it needs no teacher."""
    spec = required_target(loss)
    if spec is None or teacher.bridge is None:
        return spec
    return TargetSpec("sampled" if teacher.bridge.kind == "span" else "hidden")


class TeacherSession(Protocol):
    """A teacher that is ready to score and generate."""

    def score(
        self, sequences: Sequence[TeacherSequence], spec: TargetSpec, max_tokens: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield `(index, [trained tokens, width])` for every sequence, in any order.

        The width is d_T for hidden states, 2k + 3 for top k and 2 for sampled tokens (`loss.targets`).
        Forward passes take at most `max_tokens` tokens, padding included.
        """

    def generator(self) -> RolloutEngine:
        """An engine that generates with this teacher's weights."""


class Teacher(Protocol):
    """A model to learn from. All processes of a run hold it and open it together."""

    @property
    def name(self) -> str:
        """The recipe's name of the teacher."""

    @property
    def fingerprint(self) -> str | None:
        """Digest of the weights; None where they change."""

    @property
    def bytes_read(self) -> int:
        """Checkpoint bytes that this process has read for it so far."""

    @property
    def capabilities(self) -> TeacherCapabilities:
        """The targets that it can provide, and whether it can generate."""

    @property
    def head_key(self) -> Hashable:
        """Equal for teachers whose prediction heads are equal; changes with the weights."""

    def open(self) -> AbstractContextManager[TeacherSession]:
        """Load the teacher; its memory is released when the context ends. Collective.

        Raises TeacherError when it is not the model described by its card.
        """

    def prefetch(self) -> None:
        """Start reading ahead the files that `open` needs; returns at once."""

    def head(self, vocab: range | None) -> Head:
        """The prediction head for `hidden` targets, whole or the rows of these token ids. Not collective."""
