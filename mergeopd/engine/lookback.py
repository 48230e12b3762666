"""What is measured on a whole round before its first update: `pi_old`, and the teachers beside it.

Only where an objective needs it, since it costs one more forward pass of the student.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergeopd.engine.batch import Before, Dialects, targets, term_weights
from mergeopd.engine.build import Parts
from mergeopd.engine.schedule import pack
from mergeopd.loss.divergence import ReverseKL
from mergeopd.recipe.training import Phase
from mergeopd.report.events import Reporter, StageProgress, StageStarted
from mergeopd.teacher.cache import HiddenCache
from mergeopd.types import Rollout


def is_needed(phase: Phase) -> bool:
    """Whether the phase asks for anything that a single pass over micro-batches cannot know."""
    loss = phase.loss
    sampled = loss.sampled_reverse_kl
    return bool(
        phase.balance.follow_gap
        or (loss.has_policy and phase.updates_per_round > 1)
        or (loss.has_policy and phase.correction.kind == "sequence_mask")
        or (sampled is not None and sampled.needs_whole_answers)
    )


def look_back(
    parts: Parts,
    rollouts: Sequence[Rollout],
    phase: Phase,
    round_index: int,
    cache: HiddenCache,
    reporter: Reporter,
) -> dict[int, Before]:
    """`Before` of every answer with tokens, by its index in the round."""
    needs_teacher = phase.loss.needs_teacher
    dialects = Dialects(parts.inputs.student, parts.inputs.teachers)
    measure = (ReverseKL(),) if phase.balance.follow_gap and phase.loss.has_divergence else ()
    packs = pack(rollouts, range(len(rollouts)), parts.plan.student.micro_batch_tokens, round_index)
    reporter.emit(StageStarted("update", "the policy before", len(packs), "micro-batches"))
    found: dict[int, Before] = {}
    for done, part in enumerate(packs, start=1):
        heads = parts.store.heads(part.teachers) if needs_teacher else {}
        names = tuple(name for name in part.teachers if name in heads)
        members = [rollouts[i] for i in part.rollouts]
        stats = parts.student.score(
            [m.prompt_ids for m in members],
            [m.response_ids for m in members],
            targets(part, names, cache, heads),
            measure,
            phase.loss.temperature,
        )
        sizes = [len(m.response_ids) for m in members]
        masked = [dialects.eos_masked(m) for m in members]
        weights = torch.tensor(
            [
                [
                    weight
                    for m, skip in zip(members, masked, strict=True)
                    for weight in term_weights(m, m.prompt.teachers[name], skips_last=name in skip)
                ]
                for name in names
            ],
            dtype=torch.float64,
        )
        apart = stats.divergence[:, 0] if measure else (stats.logprob_T - stats.logprob_S).abs()
        gaps = (weights.reshape(apart.shape) * apart.cpu()).sum(0)
        student = torch.split(stats.logprob_S, sizes)
        teachers = torch.split(stats.logprob_T, sizes, dim=1)
        for index, logprob_S, logprob_T, gap in zip(
            part.rollouts, student, teachers, torch.split(gaps, sizes), strict=True
        ):
            found[index] = Before(logprob_S, dict(zip(names, logprob_T, strict=True)), float(gap.sum()))
        reporter.emit(StageProgress(done))
    return found
