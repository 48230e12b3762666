"""From a scored round to micro-batches: weights and denominators of each update, tensors of each pack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergeopd.align.answers import Alignment
from mergeopd.engine.crossing import Alignments, Crossing
from mergeopd.engine.dialect import Dialect, masked_in_teacher_term
from mergeopd.engine.objectives import correction
from mergeopd.engine.outcomes import Outcomes
from mergeopd.engine.preflight import Inputs
from mergeopd.engine.schedule import Pack
from mergeopd.loss.bridge import Bridge, Groups
from mergeopd.loss.heads import Hidden
from mergeopd.loss.policy import PolicyRows, answers_advantage, bounded, sequence_kept
from mergeopd.loss.prepare import Answer, answer_weights
from mergeopd.loss.targets import Target
from mergeopd.recipe.training import Phase
from mergeopd.student.batch import BridgedTarget, MicroBatch
from mergeopd.types import Rollout


@dataclass(frozen=True, slots=True)
class Before:
    """One answer before its round's first update; tensors have one number per trained token.

    `gap` is the sum over its tokens and teachers, weighted, of the reverse KL: exact where the teacher's
    whole distribution is at hand, else |log p_T - log p_S| of the token as written. A teacher that does not
    know the token that ends the answer is not asked about it here either. `spans`: of teachers whose bridge
    is a policy term, each group's log-ratio at each of its tokens.
    """

    logprob_S: Tensor
    logprob_T: Mapping[str, Tensor]
    gap: float
    spans: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PreparedRollout:
    """A rollout with its final weights.

    `token_weight` multiplies every trained token: denominator and domain budget. `teacher_weight` is the
    prompt's weight of each teacher times what the verdict makes of it; `eos_masked` has the trained tokens
    (by position) that a teacher's term skips. `outcome` is the answer's advantage with all weights; `is_kept`
    is False where a correction drops the answer from policy terms. `logprob_old` and `teacher_advantage`
    (with all weights) have one number per trained token, where they are needed; so has `span_advantage`, from
    the `spans` of `Before`. `alignments` has what teachers with other tokenizers read of the answer; their
    weights contain the objective's.
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
    """How the student and its teachers read; those that are `crossed` have other tokens."""

    student: Dialect
    teachers: Mapping[str, Dialect]
    crossed: Mapping[str, Crossing]

    @classmethod
    def of(cls, inputs: Inputs) -> Dialects:
        """Those of a run."""
        return cls(inputs.student, inputs.teachers, inputs.crossings)

    def eos_masked(self, rollout: Rollout) -> dict[str, tuple[int, ...]]:
        """Trained tokens, by position, that a teacher's term skips. A bridge has its own rule for ends."""
        mine = {name: self.teachers[name] for name in rollout.prompt.teachers if name not in self.crossed}
        return masked_in_teacher_term(rollout.trained_ids, self.student, mine)


def prepare(
    rollouts: Sequence[Rollout],
    update: Sequence[int],
    phase: Phase,
    updates_done: int,
    dialects: Dialects,
    found: Outcomes,
    before: Mapping[int, Before],
    alignments: Alignments = MappingProxyType({}),
) -> PreparedUpdate:
    """All weights and global denominators of one update, before any gradient.

    `update` names its rollouts; `found`, `before` and `alignments` (empty where not needed) are the round's;
    `updates_done` counts the updates of the phase.
    """
    answers = [
        Answer(rollouts[i].prompt.domain, rollouts[i].num_trained, before[i].gap if i in before else 0.0)
        for i in update
    ]
    weights, budgets = answer_weights(answers, phase.reduce, phase.balance.tokens, phase.balance.follow_gap)
    outcome_weight = phase.loss.weight("outcome", updates_done)
    bridge_weight = phase.loss.teachers_weight(updates_done)
    prepared = {}
    for index, weight in zip(update, weights, strict=True):
        rollout = rollouts[index]
        plain = PreparedRollout(
            rollout=rollout,
            token_weight=weight,
            teacher_weight={
                name: w * found.teaching[index] * (bridge_weight if name in dialects.crossed else 1.0)
                for name, w in rollout.prompt.teachers.items()
            },
            eos_masked=dialects.eos_masked(rollout),
            outcome=weight * outcome_weight * found.advantage[index],
            alignments={n: own[index] for n, own in alignments.items() if index in own},
        )
        looks_back = plain.is_own and index in before
        if looks_back and (phase.loss.has_policy or before[index].spans):
            prepared[index] = _with_past(plain, before[index], phase, updates_done, dialects)
        else:
            prepared[index] = plain
    return PreparedUpdate(prepared, budgets)


def _with_past(
    plain: PreparedRollout, before: Before, phase: Phase, updates_done: int, dialects: Dialects
) -> PreparedRollout:
    """The student's own answer with what only the look back knows."""
    behaviour = before.logprob_S.new_tensor(plain.rollout.logprobs_behaviour or ())
    sampled = phase.loss.sampled_reverse_kl
    advantage = None
    # Prompts whose teachers all have other tokens have no log-ratio of a single token.
    if sampled is not None and sampled.needs_whole_answers and before.logprob_T:
        coefficient = phase.loss.weight("sampled_reverse_kl", updates_done)
        names = tuple(before.logprob_T)
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
        span_advantage=_span_advantage(plain, before, dialects) if before.spans else None,
        spans=before.spans,
    )


def _span_advantage(plain: PreparedRollout, before: Before, dialects: Dialects) -> Tensor:
    """Every token of a group has the group's log-ratio as its advantage, with all weights."""
    total = torch.zeros_like(before.logprob_S)
    for name, ratio in before.spans.items():
        span = dialects.crossed[name].bridge.span
        bound = None if span is None else span.bound
        total += plain.token_weight * plain.teacher_weight[name] * bounded(ratio, bound)
    return total


def micro_batch(
    pack: Pack,
    prepared: PreparedUpdate,
    targets: Mapping[str, Target],
    like: Tensor,
    *,
    with_policy: bool,
    measures: Mapping[str, Bridge] = MappingProxyType({}),
) -> MicroBatch:
    """The tensors of one pack, weights in the dtype and on the device of `like`.

    `targets` holds this pack's teachers, or nothing when none is needed; those in `measures` have other
    tokens than the student. Text that the student wrote itself
    has no likelihood term.
    """
    members = [prepared.rollouts[i] for i in pack.rollouts]
    own = {name: target for name, target in targets.items() if name not in measures}
    teacher_rows = [[weight for m in members for weight in m.teacher_token_weights(name)] for name in own]
    nll_row = _per_token(members, [0.0 if m.is_own else m.token_weight for m in members])
    nll_N = like.new_tensor(nll_row)
    return MicroBatch(
        rollouts=pack.rollouts,
        teachers=tuple(own),
        prompts=tuple(m.rollout.prompt_ids for m in members),
        responses=tuple(m.rollout.response_ids for m in members),
        targets=tuple(own.values()),
        teacher_weight_KN=like.new_tensor(teacher_rows).reshape(len(own), len(nll_row)),
        nll_weight_N=nll_N,
        policy=_policy_rows(members, like) if with_policy else None,
        trained=tuple(m.rollout.trained for m in members),
        bridged=tuple(
            _bridged(name, members, target, measures[name], like)
            for name, target in targets.items()
            if name in measures and isinstance(target, Hidden)
        ),
    )


def pack_groups(alignments: Sequence[Alignment], lengths: Sequence[int], device: torch.device) -> Groups:
    """The groups of a micro-batch's answers, in rows of both sides; `lengths` are the student's."""
    columns: tuple[list[NDArray[np.int64]], ...] = ([], [], [], [])
    follows: list[NDArray[np.bool_]] = []
    row_S = row_T = 0
    for own, length in zip(alignments, lengths, strict=True):
        columns[0].append(own.student_starts + row_S)
        columns[1].append(own.student_stops - own.student_starts)
        columns[2].append(own.teacher_starts + row_T)
        columns[3].append(own.teacher_stops - own.teacher_starts)
        row_S, row_T = row_S + length, row_T + len(own.teacher_ids)
        goes_on = np.zeros(len(own.student_starts), bool)
        goes_on[1:] = own.student_starts[1:] == own.student_stops[:-1]
        goes_on[1:] &= own.teacher_starts[1:] == own.teacher_stops[:-1]
        follows.append(goes_on)
    first_S, num_S, first_T, num_T = (
        torch.from_numpy(np.concatenate(column)).to(device, torch.int64) for column in columns
    )
    return Groups(first_S, num_S, first_T, num_T, torch.from_numpy(np.concatenate(follows)).to(device))


def _bridged(
    name: str, members: Sequence[PreparedRollout], target: Hidden, measure: Bridge, like: Tensor
) -> BridgedTarget:
    """A teacher with other tokens on one micro-batch. A group weighs as much as its student tokens."""
    own = [m.alignments[name] for m in members]
    groups = pack_groups(own, [m.rollout.num_trained for m in members], like.device)
    weights = like.new_tensor([m.token_weight * m.teacher_weight[name] for m in members])
    num_groups = [len(a.student_starts) for a in own]
    per_group = weights.repeat_interleave(
        torch.tensor(num_groups, device=like.device), output_size=sum(num_groups)
    )
    return BridgedTarget(
        teacher=name,
        target=target,
        labels=torch.from_numpy(np.concatenate([a.teacher_ids for a in own])).to(like.device),
        groups=groups,
        measure=measure,
        weight_G=per_group * groups.num_S.to(like),
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
        span_N=_joined([m.span_advantage for m in members], members, like),
    )


def _behaviour(member: PreparedRollout) -> Sequence[float]:
    known = member.rollout.logprobs_behaviour
    if known is None and member.is_own:
        raise ValueError(f"{member.rollout.prompt.key}: the student's answer has no behaviour log-probs")
    return [0.0] * member.rollout.num_trained if known is None else known


def _joined(
    parts: Sequence[Tensor | None], members: Sequence[PreparedRollout], like: Tensor
) -> Tensor | None:
    """The responses' rows one after another, zeros for text of others; None where no response has any."""
    if all(part is None for part in parts):
        return None
    rows = [
        # Rows of the prior policy are on the CPU, where they are kept for a round.
        like.new_zeros(m.rollout.num_trained) if part is None else part.to(like)
        for part, m in zip(parts, members, strict=True)
    ]
    return torch.cat(rows)


def _per_token(members: Sequence[PreparedRollout], values: Sequence[float]) -> list[float]:
    return [value for m, value in zip(members, values, strict=True) for _ in range(m.rollout.num_trained)]
