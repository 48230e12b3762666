"""From a scored round to micro-batches: weights and denominators of each update, tensors of each pack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mergeopd.engine.dialect import Dialect, masked_in_teacher_term
from mergeopd.engine.schedule import Pack
from mergeopd.loss.heads import Head, Hidden
from mergeopd.loss.prepare import Answer, answer_weights
from mergeopd.recipe.training import Phase
from mergeopd.student.batch import MicroBatch
from mergeopd.teacher.cache import HiddenCache
from mergeopd.types import Rollout


@dataclass(frozen=True, slots=True)
class PreparedRollout:
    """A rollout with its final weights.

    `token_weight` multiplies every trained token: denominator and domain budget. `teacher_weight` is the
    prompt's weight of each teacher; `eos_masked` has the trained tokens (by position) that a teacher's term
    skips.
    """

    rollout: Rollout
    token_weight: float
    teacher_weight: Mapping[str, float]
    eos_masked: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class PreparedUpdate:
    """One update of a round; `rollouts` by their index in the round, `budgets` by domain."""

    rollouts: Mapping[int, PreparedRollout]
    budgets: Mapping[str, float]


def prepare(
    rollouts: Sequence[Rollout],
    update: Sequence[int],
    phase: Phase,
    student: Dialect,
    teachers: Mapping[str, Dialect],
) -> PreparedUpdate:
    """All weights and global denominators of one update, before any gradient."""
    members = [rollouts[i] for i in update]
    weights, budgets = answer_weights(
        [Answer(r.prompt.domain, r.num_trained) for r in members], phase.reduce, phase.balance.tokens
    )
    prepared = {
        index: PreparedRollout(
            rollout=rollout,
            token_weight=weight,
            teacher_weight=rollout.prompt.teachers,
            eos_masked=masked_in_teacher_term(
                rollout.trained_ids, student, {name: teachers[name] for name in rollout.prompt.teachers}
            ),
        )
        for index, rollout, weight in zip(update, members, weights, strict=True)
    }
    return PreparedUpdate(prepared, budgets)


def micro_batch(
    pack: Pack,
    prepared: PreparedUpdate,
    cache: HiddenCache,
    heads: Mapping[str, Head],
    device: torch.device,
    dtype: torch.dtype,
) -> MicroBatch:
    """The tensors of one pack. `heads` holds this pack's teachers, or nothing when no divergence is used.

    Text that the student wrote itself has no likelihood term.
    """
    members = [prepared.rollouts[i] for i in pack.rollouts]
    names = tuple(name for name in pack.teachers if name in heads)
    teacher_rows = [[weight for m in members for weight in _teacher_token_weights(m, name)] for name in names]
    nll_row = [
        0.0 if m.rollout.origin == "student" else m.token_weight
        for m in members
        for _ in m.rollout.trained_ids
    ]
    return MicroBatch(
        rollouts=pack.rollouts,
        teachers=names,
        prompts=tuple(m.rollout.prompt_ids for m in members),
        responses=tuple(m.rollout.response_ids for m in members),
        targets=tuple(Hidden(cache.gather(name, pack.rollouts), heads[name]) for name in names),
        teacher_weight_KN=torch.tensor(teacher_rows, dtype=dtype, device=device).reshape(
            len(names), len(nll_row)
        ),
        nll_weight_N=torch.tensor(nll_row, dtype=dtype, device=device),
        trained=tuple(m.rollout.trained for m in members),
    )


def _teacher_token_weights(member: PreparedRollout, teacher: str) -> list[float]:
    weight = member.token_weight * member.teacher_weight[teacher]
    masked = member.eos_masked.get(teacher, ())
    return [0.0 if position in masked else weight for position in range(member.rollout.num_trained)]
