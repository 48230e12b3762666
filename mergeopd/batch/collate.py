"""Collate prepared rollouts and targets into the tensors of a micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergeopd.align.responses import Alignment
from mergeopd.batch.micro_batch import BridgedTarget, MicroBatch
from mergeopd.batch.packing import MicroBatchPlan
from mergeopd.batch.records import PreparedRollout, PreparedUpdate, TokenViews
from mergeopd.loss.cross_tokenizer import Groups
from mergeopd.loss.objective import SAMPLED
from mergeopd.loss.policy import PolicyRows
from mergeopd.loss.targets import Target
from mergeopd.transfers import to_device
from mergeopd.types import LogProbs

# The overlap of likely tokens is measured on this share of an update's tokens, or on about this number if
# that is less: a search for the likeliest tokens costs more than a divergence.
_LARGEST_SHARE, _ENOUGH_TOKENS = 1 / 8, 2048
# Steps of a two-dimensional sequence of low discrepancy (the inverse of the plastic number, and its square).
_STEP_OF_TOKEN, _STEP_OF_ROLLOUT = 0.7548776662466927, 0.5698402909980532


def micro_batch(
    pack: MicroBatchPlan,
    prepared: PreparedUpdate,
    targets: Mapping[str, Target],
    views: TokenViews,
    like: Tensor,
    *,
    with_policy: bool,
    terms: Sequence[str] = (),
) -> MicroBatch:
    """Collate one pack, with weights in the dtype and on the device of `like`.

    `targets` has the targets of the pack's teachers; empty where none is needed. `terms` are the divergences
    of the objective, in order. Responses that the student generated have no likelihood term.
    """
    members = [prepared.rollouts[i] for i in pack.rollouts]
    own: dict[str, Target] = {}
    bridged: list[BridgedTarget] = []
    for name, target in targets.items():
        made = views[name].target(target, members, like)
        if isinstance(made, BridgedTarget):
            bridged.append(made)
        elif made is not None:
            own[name] = made
    teacher_rows = _teacher_rows(members, list(own), "")
    nll_row = _per_token(members, [0.0 if m.is_own else m.token_weight for m in members])
    return MicroBatch(
        rollouts=pack.rollouts,
        teachers=tuple(own),
        prompts=tuple(m.rollout.prompt_ids for m in members),
        responses=tuple(m.rollout.response_ids for m in members),
        targets=tuple(own.values()),
        teacher_weight_KN=_like(teacher_rows, like),
        nll_weight_N=_like(nll_row, like),
        policy=_policy_rows(members, list(own), like) if with_policy else None,
        trained=tuple(m.rollout.trained for m in members),
        bridged=tuple(bridged),
        term_weight_KDN=_like(
            np.stack([_teacher_rows(members, list(own), term) for term in terms], axis=1), like
        )
        if any(term in m.term_weight for m in members for term in terms)
        else None,
        overlap_rows=None
        if prepared.overlap_share is None
        else torch.from_numpy(_spread(pack.rollouts, members, prepared.overlap_share)),
        routes=tuple(m.rollout.routes for m in members),
    )


def overlap_share(num_tokens: int) -> float:
    """Return the share of an update's `num_tokens` tokens whose overlap is measured."""
    return min(_LARGEST_SHARE, _ENOUGH_TOKENS / max(num_tokens, 1))


def _spread(rollouts: Sequence[int], members: Sequence[PreparedRollout], share: float) -> NDArray[np.int64]:
    """Choose a share of the tokens, evenly over responses and positions, whatever the micro-batches are."""
    phases = [
        index * _STEP_OF_ROLLOUT + np.arange(m.rollout.num_trained) * _STEP_OF_TOKEN
        for index, m in zip(rollouts, members, strict=True)
    ]
    return np.flatnonzero(np.concatenate(phases) % 1.0 < share)


def _teacher_rows(
    members: Sequence[PreparedRollout], teachers: Sequence[str], term: str
) -> NDArray[np.float64]:
    """Return the final weights of teachers in a term, `[K, N]`."""
    rows = [np.concatenate([m.teacher_token_weights(name, term) for m in members]) for name in teachers]
    return np.array(rows, np.float64).reshape(len(teachers), sum(m.rollout.num_trained for m in members))


def pack_groups(alignments: Sequence[Alignment], lengths: Sequence[int], device: torch.device) -> Groups:
    """Concatenate the groups of a micro-batch's responses; `lengths` are the student's tokens."""
    rows: list[tuple[NDArray[np.int64] | NDArray[np.bool_], ...]] = []
    row_S = row_T = 0
    for own, length in zip(alignments, lengths, strict=True):
        follows = np.zeros(len(own.student_starts), bool)
        follows[1:] = own.student_starts[1:] == own.student_stops[:-1]
        follows[1:] &= own.teacher_starts[1:] == own.teacher_stops[:-1]
        num_S, num_T = own.student_stops - own.student_starts, own.teacher_stops - own.teacher_starts
        rows.append((own.student_starts + row_S, num_S, own.teacher_starts + row_T, num_T, follows))
        row_S, row_T = row_S + length, row_T + len(own.teacher_ids)
    columns = (np.concatenate(column) for column in zip(*rows, strict=True))
    return Groups(*(to_device(torch.from_numpy(column), device) for column in columns))


def _policy_rows(members: Sequence[PreparedRollout], teachers: Sequence[str], like: Tensor) -> PolicyRows:
    """Collate the constants of the policy terms, in the dtype and on the device of `like`."""

    def row(values: Sequence[float]) -> Tensor:
        return _like(_per_token(members, values), like)

    return PolicyRows(
        own_N=row([float(m.is_own) for m in members]),
        outcome_N=row([m.outcome for m in members]),
        behaviour_N=_like(np.concatenate([_behaviour(m) for m in members]), like),
        keep_N=row([float(m.is_kept) for m in members]),
        old_N=_joined([m.logprob_old for m in members], members, like),
        teacher_N=_joined([m.teacher_advantage for m in members], members, like),
        span_N=_joined([m.span_advantage for m in members], members, like),
        sampled_KN=_like(_teacher_rows(members, teachers, SAMPLED), like)
        if any(SAMPLED in m.term_weight for m in members)
        else None,
    )


def _behaviour(member: PreparedRollout) -> LogProbs:
    known = member.rollout.trained_logprobs
    if known is None and member.is_own:
        raise ValueError(
            f"{member.rollout.prompt.key}: the student's response has no behaviour log-probabilities"
        )
    return np.zeros(member.rollout.num_trained, np.float32) if known is None else known


def _joined(
    parts: Sequence[Tensor | None], members: Sequence[PreparedRollout], like: Tensor
) -> Tensor | None:
    """Concatenate the responses' rows, zeros where one has none; None where no response has any."""
    if all(part is None for part in parts):
        return None
    rows = [
        # Rows of the prior policy are on the CPU, where they are kept for a round.
        like.new_zeros(m.rollout.num_trained) if part is None else to_device(part.to(like.dtype), like.device)
        for part, m in zip(parts, members, strict=True)
    ]
    return torch.cat(rows)


def _like(values: NDArray[np.generic], like: Tensor) -> Tensor:
    """Copy numbers to the device of `like`, in its dtype."""
    return to_device(torch.as_tensor(values, dtype=like.dtype), like.device)


def _per_token(members: Sequence[PreparedRollout], values: Sequence[float]) -> NDArray[np.float64]:
    return np.repeat(np.array(values, np.float64), [m.rollout.num_trained for m in members])
