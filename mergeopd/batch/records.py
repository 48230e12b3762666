"""Records of a round between scoring and the gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mergeopd.align.responses import Alignment
from mergeopd.batch.micro_batch import BridgedTarget
from mergeopd.loss.targets import Target
from mergeopd.recipe.loss_terms import Loss
from mergeopd.types import Prompt, Rollout


@dataclass(frozen=True, slots=True)
class OldLogProbs:
    """Log-probabilities of one response before its round's first update; tensors `[trained tokens]`.

    `gap` is the sum over its tokens and teachers, weighted, of the reverse KL: exact where the teacher's
    whole distribution is kept, else |log p_T - log p_S| of the sampled token. Positions that a teacher's term
    skips are left out here too. `spans`: of teachers whose bridge is a policy term, each group's log-ratio at
    each of its tokens.
    """

    logprob_S: Tensor
    logprob_T: Mapping[str, Tensor]
    gap: float
    spans: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PriorScores:
    """What the prior policy's pass over a round yields.

    `logprobs` of the rollouts of this process's copy of the student, by index in the round; `gaps` are those
    of all rollouts, where the weights of a domain follow them, else empty.
    """

    logprobs: Mapping[int, OldLogProbs] = field(default_factory=dict)
    gaps: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PreparedRollout:
    """A rollout with its final weights.

    `token_weight` multiplies every trained token: denominator and domain budget. `teacher_weight` is the
    prompt's weight of each teacher times what the rewards make of it, and `term_weight` that of teachers that
    single terms have instead, by term; `eos_masked` has the trained tokens
    (by position) that a teacher's term skips. `outcome` is the response's advantage with all weights;
    `is_kept` is False where a correction drops the response from policy terms. `logprob_old` and
    `teacher_advantage` and `span_advantage` (from the `spans` of `OldLogProbs`), with all weights, have one
    number per trained token, where they are needed. `alignments` are those of teachers with other tokenizers,
    whose weights contain the objective's.
    """

    rollout: Rollout
    token_weight: float
    teacher_weight: Mapping[str, float]
    eos_masked: Mapping[str, tuple[int, ...]]
    outcome: float = 0.0
    is_kept: bool = True
    logprob_old: Tensor | None = None
    teacher_advantage: Tensor | None = None
    span_advantage: Tensor | None = None
    spans: Mapping[str, Tensor] = field(default_factory=dict)
    alignments: Mapping[str, Alignment] = field(default_factory=dict)
    term_weight: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def is_own(self) -> bool:
        """Whether the student generated it."""
        return self.rollout.origin == "student"

    def teacher_token_weights(self, teacher: str, term: str = "") -> NDArray[np.float64]:
        """The final weight of this teacher in a term, for every trained token; default: in most terms."""
        weight = self.term_weight.get(term, self.teacher_weight).get(teacher, 0.0)
        weights = np.full(self.rollout.num_trained, self.token_weight * weight)
        weights[list(self.eos_masked.get(teacher, ()))] = 0.0
        return weights


@dataclass(frozen=True, slots=True)
class PreparedUpdate:
    """One update of a round; `rollouts` by their index in the round, `budgets` by domain.

    `overlap_share`: the share of tokens whose overlap with teachers is measured; None: none.
    """

    rollouts: Mapping[int, PreparedRollout]
    budgets: Mapping[str, float]
    overlap_share: float | None = None


class TokenView(Protocol):
    """A teacher's view of responses, for weights and micro-batches; implemented in `teacher.token_view`."""

    def loss_weight(self, teacher: str, prompt: Prompt, loss: Loss, updates_done: int) -> float:
        """Return the weight of this teacher, named `teacher`, after `updates_done` updates of the phase."""

    def masked(self, rollout: Rollout) -> tuple[int, ...]:
        """Return the trained tokens, by position, that this teacher's term skips."""

    def advantage(self, old: OldLogProbs) -> Tensor | None:
        """Return its own policy advantage `[trained tokens]`, without weights; None where it has none."""

    def target(
        self, target: Target, members: Sequence[PreparedRollout], like: Tensor
    ) -> Target | BridgedTarget | None:
        """Return this teacher's target of the loss on a micro-batch; None: nothing beside `advantage`."""


# By teacher, then by the rollout's index in the round.
Alignments = Mapping[str, Mapping[int, Alignment]]
TokenViews = Mapping[str, TokenView]
