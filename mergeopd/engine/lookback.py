"""What is measured on a whole round before its first update: `pi_old`, and the teachers beside it.

Only where an objective needs it, since it costs one more forward pass of the student.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergeopd.engine.batch import Before
from mergeopd.engine.build import Parts
from mergeopd.engine.objectives import support
from mergeopd.engine.observing import Observed
from mergeopd.engine.schedule import pack
from mergeopd.loss.divergence import ReverseKL
from mergeopd.recipe.training import Phase
from mergeopd.report.events import Reporter, StageProgress, StageStarted
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
    observed: Observed,
    reporter: Reporter,
) -> dict[int, Before]:
    """`Before` of every answer with tokens, by its index in the round."""
    measure = (ReverseKL(),) if phase.balance.follow_gap and phase.loss.has_divergence else ()
    packs = pack(rollouts, range(len(rollouts)), parts.plan.student.micro_batch_tokens, round_index)
    reporter.emit(StageStarted("update", "the policy before", len(packs), "micro-batches"))
    found: dict[int, Before] = {}
    for done, part in enumerate(packs, start=1):
        targets = observed.targets(parts, part)
        members = [rollouts[i] for i in part.rollouts]
        stats = parts.student.score(
            [m.prompt_ids for m in members],
            [m.response_ids for m in members],
            tuple(targets.values()),
            measure,
            support(phase.loss),
            phase.loss.temperature,
        )
        sizes = [len(m.response_ids) for m in members]
        weights = torch.tensor([[m.prompt.teachers[name] for m in members] for name in targets])
        gaps = stats.divergence[:, 0] if measure else (stats.logprob_T - stats.logprob_S).abs()
        student = torch.split(stats.logprob_S, sizes)
        teachers = torch.split(stats.logprob_T, sizes, dim=1)
        for column, (index, logprob_S, logprob_T, gap) in enumerate(
            zip(part.rollouts, student, teachers, torch.split(gaps, sizes, dim=1), strict=True)
        ):
            found[index] = Before(
                logprob_S,
                dict(zip(targets, logprob_T, strict=True)),
                float((gap.sum(1).cpu() * weights[:, column]).sum()) if targets else 0.0,
            )
        reporter.emit(StageProgress(done))
    return found
