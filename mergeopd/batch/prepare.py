"""The weights, advantages and denominators of an update, before any gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from mergeopd.batch.advantages import Outcomes, answers_advantage, sequence_kept
from mergeopd.batch.objective import correction
from mergeopd.batch.records import (
    Alignments,
    OldLogProbs,
    PreparedRollout,
    PreparedUpdate,
    TokenViews,
)
from mergeopd.batch.weights import Answer, answer_weights
from mergeopd.recipe.training import Phase
from mergeopd.types import Rollout


def prepare(
    rollouts: Sequence[Rollout],
    update: Sequence[int],
    phase: Phase,
    updates_done: int,
    views: TokenViews,
    outcomes: Outcomes,
    before: Mapping[int, OldLogProbs],
    alignments: Alignments,
) -> PreparedUpdate:
    """All weights and global denominators of one update, before any gradient.

    `update` names its rollouts; `outcomes`, `before` and `alignments` (empty if not needed) are the round's;
    `updates_done` counts the updates of the phase.
    """
    answers = [
        Answer(rollouts[i].prompt.domain, rollouts[i].num_trained, before[i].gap if i in before else 0.0)
        for i in update
    ]
    weights, budgets = answer_weights(answers, phase.reduce, phase.balance.tokens, phase.balance.follow_gap)
    outcome_weight = phase.loss.weight("outcome", updates_done)
    factors = {name: view.loss_weight(phase.loss, updates_done) for name, view in views.items()}
    prepared = {}
    for index, weight in zip(update, weights, strict=True):
        rollout = rollouts[index]
        plain = PreparedRollout(
            rollout=rollout,
            token_weight=weight,
            teacher_weight={
                name: w * outcomes.teacher_loss_weight[index] * factors[name]
                for name, w in rollout.prompt.teachers.items()
            },
            eos_masked=masked_tokens(rollout, views),
            outcome=weight * outcome_weight * outcomes.advantage[index],
            alignments={n: own[index] for n, own in alignments.items() if index in own},
        )
        looks_back = plain.is_own and index in before
        if looks_back and (phase.loss.has_policy or before[index].spans):
            prepared[index] = _with_past(plain, before[index], phase, updates_done, views)
        else:
            prepared[index] = plain
    return PreparedUpdate(prepared, budgets)


def _with_past(
    plain: PreparedRollout, before: OldLogProbs, phase: Phase, updates_done: int, views: TokenViews
) -> PreparedRollout:
    """The student's own answer with what only the look back knows."""
    known = plain.rollout.logprobs_behaviour
    behaviour = before.logprob_S.new_tensor(() if known is None else known)
    sampled = phase.loss.sampled_reverse_kl
    advantage = None
    # Prompts whose teachers all have other tokens have no log-ratio of a single token.
    if sampled is not None and sampled.needs_full_responses and before.logprob_T:
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
        span_advantage=_span_advantage(plain, before, views),
        spans=before.spans,
    )


def masked_tokens(rollout: Rollout, views: TokenViews) -> dict[str, tuple[int, ...]]:
    """Trained tokens, by position, that the term of each teacher skips; teachers without any are absent."""
    masked = {name: views[name].masked(rollout) for name in rollout.prompt.teachers}
    return {name: positions for name, positions in masked.items() if positions}


def _span_advantage(plain: PreparedRollout, old: OldLogProbs, views: TokenViews) -> Tensor | None:
    """The sum of the teachers' own advantages with all weights; None where no teacher has one."""
    total = None
    for name in old.spans:
        advantage = views[name].advantage(old)
        if advantage is not None:
            weighted = plain.token_weight * plain.teacher_weight[name] * advantage
            total = weighted if total is None else total + weighted
    return total
