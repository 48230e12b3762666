"""From a scored round to micro-batches: weights and denominators of each update, tensors of each pack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergeopd.engine.dialect import Dialect, masked_in_teacher_term
from mergeopd.engine.objectives import correction
from mergeopd.engine.outcomes import Outcomes
from mergeopd.engine.schedule import Pack
from mergeopd.loss.policy import PolicyRows, answers_advantage, sequence_kept
from mergeopd.loss.prepare import Answer, answer_weights
from mergeopd.loss.targets import Target
from mergeopd.recipe.training import Phase
from mergeopd.student.batch import MicroBatch
from mergeopd.types import Rollout


@dataclass(frozen=True, slots=True)
class Before:
    """One answer before its round's first update; tensors have one number per trained token.

    `gap` is the sum over its tokens and teachers, weighted, of the reverse KL: exact where the teacher's
    whole distribution is at hand, else |log p_T - log p_S| of the token as written. A teacher that does not
    know the token that ends the answer is not asked about it here either.
    """

    logprob_S: Tensor
    logprob_T: Mapping[str, Tensor]
    gap: float


@dataclass(frozen=True, slots=True)
class PreparedRollout:
    """A rollout with its final weights.

    `token_weight` multiplies every trained token: denominator and domain budget. `teacher_weight` is the
    prompt's weight of each teacher times what the verdict makes of it; `eos_masked` has the trained tokens
    (by position) that a teacher's term skips. `outcome` is the answer's advantage with all weights; `is_kept`
    is False where a correction drops the answer from policy terms. `logprob_old` and `teacher_advantage`
    (with all weights) have one number per trained token, where they are needed.
    """

    rollout: Rollout
    token_weight: float
    teacher_weight: Mapping[str, float]
    eos_masked: Mapping[str, tuple[int, ...]]
    outcome: float = 0.0
    is_kept: bool = True
    logprob_old: Tensor | None = None
    teacher_advantage: Tensor | None = None

    @property
    def is_own(self) -> bool:
        """Whether the student wrote it."""
        return self.rollout.origin == "student"

    def teacher_token_weights(self, teacher: str) -> list[float]:
        """The final weight of this teacher's term for every trained token."""
        weight = self.token_weight * self.teacher_weight[teacher]
        masked = self.eos_masked.get(teacher, ())
        return [0.0 if position in masked else weight for position in range(self.rollout.num_trained)]


@dataclass(frozen=True, slots=True)
class PreparedUpdate:
    """One update of a round; `rollouts` by their index in the round, `budgets` by domain."""

    rollouts: Mapping[int, PreparedRollout]
    budgets: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Dialects:
    """How the student and its teachers read."""

    student: Dialect
    teachers: Mapping[str, Dialect]

    def eos_masked(self, rollout: Rollout) -> dict[str, tuple[int, ...]]:
        """Trained tokens, by position, that a teacher's term skips."""
        mine = {name: self.teachers[name] for name in rollout.prompt.teachers}
        return masked_in_teacher_term(rollout.trained_ids, self.student, mine)


def prepare(
    rollouts: Sequence[Rollout],
    update: Sequence[int],
    phase: Phase,
    updates_done: int,
    dialects: Dialects,
    found: Outcomes,
    before: Mapping[int, Before],
) -> PreparedUpdate:
    """All weights and global denominators of one update, before any gradient.

    `update` names its rollouts; `found` and `before` (empty where not needed) are those of the round;
    `updates_done` counts the updates of the phase.
    """
    answers = [
        Answer(rollouts[i].prompt.domain, rollouts[i].num_trained, before[i].gap if i in before else 0.0)
        for i in update
    ]
    weights, budgets = answer_weights(answers, phase.reduce, phase.balance.tokens, phase.balance.follow_gap)
    outcome_weight = phase.loss.weight("outcome", updates_done)
    prepared = {}
    for index, weight in zip(update, weights, strict=True):
        rollout = rollouts[index]
        plain = PreparedRollout(
            rollout=rollout,
            token_weight=weight,
            teacher_weight={n: w * found.teaching[index] for n, w in rollout.prompt.teachers.items()},
            eos_masked=dialects.eos_masked(rollout),
            outcome=weight * outcome_weight * found.advantage[index],
        )
        looks_back = plain.is_own and index in before and phase.loss.has_policy
        prepared[index] = _with_past(plain, before[index], phase, updates_done) if looks_back else plain
    return PreparedUpdate(prepared, budgets)


def _with_past(plain: PreparedRollout, before: Before, phase: Phase, updates_done: int) -> PreparedRollout:
    """The student's own answer with what only the look back knows."""
    behaviour = before.logprob_S.new_tensor(plain.rollout.logprobs_behaviour or ())
    sampled = phase.loss.sampled_reverse_kl
    advantage = None
    if sampled is not None and sampled.needs_whole_answers:
        coefficient = phase.loss.weight("sampled_reverse_kl", updates_done)
        names = tuple(plain.teacher_weight)
        advantage = coefficient * answers_advantage(
            [before.logprob_T[name] - before.logprob_S for name in names],
            [behaviour.new_tensor(plain.teacher_token_weights(name)) for name in names],
            bound=sampled.bound,
            discount=sampled.discount,
            future_only=sampled.future_only,
            per_token=sampled.per_remaining_token,
            gain=sampled.early_gain,
        )
    return replace(
        plain,
        is_kept=sequence_kept(before.logprob_S - behaviour, correction(phase)),
        logprob_old=before.logprob_S,
        teacher_advantage=advantage,
    )


def micro_batch(
    pack: Pack,
    prepared: PreparedUpdate,
    targets: Mapping[str, Target],
    like: Tensor,
    *,
    with_policy: bool,
) -> MicroBatch:
    """The tensors of one pack, weights in the dtype and on the device of `like`.

    `targets` holds this pack's teachers, or nothing when none is needed. Text that the student wrote itself
    has no likelihood term.
    """
    members = [prepared.rollouts[i] for i in pack.rollouts]
    teacher_rows = [[weight for m in members for weight in m.teacher_token_weights(name)] for name in targets]
    nll_row = _per_token(members, [0.0 if m.is_own else m.token_weight for m in members])
    nll_N = like.new_tensor(nll_row)
    return MicroBatch(
        rollouts=pack.rollouts,
        teachers=tuple(targets),
        prompts=tuple(m.rollout.prompt_ids for m in members),
        responses=tuple(m.rollout.response_ids for m in members),
        targets=tuple(targets.values()),
        teacher_weight_KN=like.new_tensor(teacher_rows).reshape(len(targets), len(nll_row)),
        nll_weight_N=nll_N,
        policy=_policy_rows(members, like) if with_policy else None,
        trained=tuple(m.rollout.trained for m in members),
    )


def _policy_rows(members: Sequence[PreparedRollout], like: Tensor) -> PolicyRows:
    """Constants of the policy terms, in the dtype and on the device of `like`."""

    def row(values: Sequence[float]) -> Tensor:
        return like.new_tensor(_per_token(members, values))

    behaviour = [value for m in members for value in _behaviour(m)]
    return PolicyRows(
        own_N=row([float(m.is_own) for m in members]),
        outcome_N=row([m.outcome for m in members]),
        behaviour_N=like.new_tensor(behaviour),
        keep_N=row([float(m.is_kept) for m in members]),
        old_N=_joined([m.logprob_old for m in members], members, like),
        teacher_N=_joined([m.teacher_advantage for m in members], members, like),
    )


def _behaviour(member: PreparedRollout) -> Sequence[float]:
    known = member.rollout.logprobs_behaviour
    if known is None and member.is_own:
        raise ValueError(f"{member.rollout.prompt.key}: the student's answer has no behaviour log-probs")
    return [0.0] * member.rollout.num_trained if known is None else known


def _joined(
    parts: Sequence[Tensor | None], members: Sequence[PreparedRollout], like: Tensor
) -> Tensor | None:
    """The answers' rows one after another, zeros where another hand wrote; None where no answer has any."""
    if all(part is None for part in parts):
        return None
    rows = [
        like.new_zeros(m.rollout.num_trained) if part is None else part
        for part, m in zip(parts, members, strict=True)
    ]
    return torch.cat(rows).to(dtype=like.dtype, device=like.device)


def _per_token(members: Sequence[PreparedRollout], values: Sequence[float]) -> list[float]:
    return [value for m, value in zip(members, values, strict=True) for _ in range(m.rollout.num_trained)]
