"""Compute the weights, advantages and denominators of an update, before any gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from mergeopd.batch.advantages import Outcomes, sequence_advantage, sequence_kept
from mergeopd.batch.collate import overlap_share
from mergeopd.batch.objective import correction
from mergeopd.batch.records import (
    Alignments,
    OldLogProbs,
    PreparedRollout,
    PreparedUpdate,
    PriorScores,
    TokenViews,
)
from mergeopd.batch.weights import ResponseSize, response_weights
from mergeopd.loss.objective import SAMPLED
from mergeopd.recipe.training import Phase
from mergeopd.types import Rollout


def prepare(
    rollouts: Sequence[Rollout],
    update: Sequence[int],
    own: Sequence[int],
    phase: Phase,
    updates_done: int,
    views: TokenViews,
    outcomes: Outcomes,
    old: PriorScores,
    alignments: Alignments,
) -> PreparedUpdate:
    """Compute the weights of some rollouts of an update, with global denominators.

    `update` has the indices of its rollouts, `own` of those to prepare; `outcomes`, `old` and `alignments`
    (empty if not needed) are the round's; `updates_done` counts the updates of the phase.
    """
    sizes = [
        ResponseSize(rollouts[i].prompt.domain, rollouts[i].num_trained, old.gaps.get(i, 0.0)) for i in update
    ]
    weights, budgets = response_weights(sizes, phase.reduce, phase.balance.tokens, phase.balance.follow_gap)
    outcome_weight = phase.loss.weight("outcome", updates_done)
    weight_of = dict(zip(update, weights, strict=True))
    prepared = {}
    for index in own:
        weight = weight_of[index]
        rollout, prompt, factor = rollouts[index], rollouts[index].prompt, outcomes.teacher_loss_weight[index]
        plain = PreparedRollout(
            rollout=rollout,
            token_weight=weight,
            teacher_weight={
                name: factor * views[name].loss_weight(name, prompt, phase.loss, updates_done)
                for name in prompt.scorers
            },
            term_weight={
                term: {name: factor * w for name, w in teachers.items()}
                for term, teachers in prompt.term_teachers.items()
            },
            eos_masked=masked_tokens(rollout, views),
            outcome=weight * outcome_weight * outcomes.advantage[index],
            alignments={n: aligned[index] for n, aligned in alignments.items() if index in aligned},
        )
        before = old.logprobs.get(index)
        if plain.is_own and before is not None and (phase.loss.has_policy or before.spans):
            plain = _with_old_logprobs(plain, before, phase, updates_done, views)
        prepared[index] = plain
    return PreparedUpdate(prepared, budgets, overlap_share(sum(size.num_tokens for size in sizes)))


def _with_old_logprobs(
    plain: PreparedRollout, old: OldLogProbs, phase: Phase, updates_done: int, views: TokenViews
) -> PreparedRollout:
    """Add what follows from the prior policy's log-probabilities to a response of the student."""
    known = plain.rollout.trained_logprobs
    behaviour = old.logprob_S.new_tensor(() if known is None else known)
    sampled = phase.loss.sampled_reverse_kl
    advantage = None
    # Prompts whose teachers all have other tokens have no log-ratio of a single token.
    if sampled is not None and sampled.needs_full_responses and old.logprob_T:
        coefficient = phase.loss.weight("sampled_reverse_kl", updates_done)
        gaps = [logprob - old.logprob_S for logprob in old.logprob_T.values()]
        weights = [behaviour.new_tensor(plain.teacher_token_weights(name, SAMPLED)) for name in old.logprob_T]
        advantage = coefficient * sequence_advantage(gaps, weights, sampled)
    return replace(
        plain,
        is_kept=sequence_kept(old.logprob_S - behaviour, correction(phase)),
        logprob_old=old.logprob_S,
        teacher_advantage=advantage,
        span_advantage=_span_advantage(plain, old, views),
        spans=old.spans,
    )


def masked_tokens(rollout: Rollout, views: TokenViews) -> dict[str, tuple[int, ...]]:
    """Return the trained tokens, by position, that each teacher's term skips, for teachers with any."""
    masked = {name: views[name].masked(rollout) for name in rollout.prompt.scorers}
    return {name: positions for name, positions in masked.items() if positions}


def _span_advantage(plain: PreparedRollout, old: OldLogProbs, views: TokenViews) -> Tensor | None:
    """Sum the teachers' own advantages with all weights; None where no teacher has one."""
    total = None
    for name in old.spans:
        advantage = views[name].advantage(old)
        if advantage is not None:
            weighted = plain.token_weight * plain.teacher_weight[name] * advantage
            total = weighted if total is None else total + weighted
    return total
