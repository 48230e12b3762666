"""What is measured on a whole round before its first update: `pi_old`, and the teachers beside it.

Only where an objective needs it, since it costs one more forward pass of the student.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mergeopd.batch.collate import (
    Before,
    Dialects,
    PreparedRollout,
    PreparedUpdate,
    micro_batch,
    pack_groups,
)
from mergeopd.batch.micro_batch import MicroBatch, Stream, with_statistics
from mergeopd.batch.objective import support
from mergeopd.batch.packing import Pack
from mergeopd.engine.build import Parts
from mergeopd.engine.schedule import RoundWork
from mergeopd.engine.targets import Observed
from mergeopd.loss.cross_tokenizer import group_logratio
from mergeopd.loss.divergence import ReverseKL
from mergeopd.recipe.training import Phase
from mergeopd.report.events import Reporter, StageProgress, StageStarted
from mergeopd.types import Rollout


def is_needed(phase: Phase, *, spans: bool = False) -> bool:
    """Whether the phase asks for anything that a single pass over micro-batches cannot know.

    `spans`: some teacher's bridge is a policy term.
    """
    loss = phase.loss
    sampled = loss.sampled_reverse_kl
    return bool(
        spans
        or phase.balance.follow_gap
        or (loss.has_policy and phase.updates_per_round > 1)
        or (loss.has_policy and phase.correction.kind == "sequence_mask")
        or (sampled is not None and sampled.needs_whole_answers)
    )


def look_back(
    parts: Parts,
    rollouts: Sequence[Rollout],
    phase: Phase,
    work: RoundWork,
    observed: Observed,
    reporter: Reporter,
) -> dict[int, Before]:
    """`Before` of every answer with tokens, by its index in the round. Collective."""
    loss, dialects = phase.loss, Dialects.of(parts.inputs)
    measure = (ReverseKL(),) if phase.balance.follow_gap and loss.has_divergence else ()
    place = parts.student.place
    packs = work.packs_of(place.copy)
    # Weights are the prompts' own here: what the gap is taken under, before any denominator.
    plain = {
        i: PreparedRollout(r, 1.0, r.prompt.teachers, dialects.eos_masked(r)) for i, r in enumerate(rollouts)
    }
    like = torch.empty((), dtype=parts.student.statistics_dtype, device=parts.device)
    reporter.emit(StageStarted("update", "the policy before", len(packs), "micro-batches"))
    found: dict[int, Before] = {}
    update = PreparedUpdate(plain, {})

    def micros() -> Iterator[MicroBatch]:
        for done, part in enumerate(packs):
            reporter.emit(StageProgress(done))
            targets = observed.targets(parts, part)
            same = {name: target for name, target in targets.items() if name not in observed.alignments}
            yield micro_batch(part, update, same, like, with_policy=False)

    scored = with_statistics(
        Stream(micros(), len(packs)),
        lambda them: parts.student.score(them, measure, support(loss), loss.temperature),
    )
    for part, (micro, stats) in zip(packs if place.has_loss else (), scored, strict=True):
        if not place.tells:
            continue
        spans = _spans(parts, part, stats.logprob_S.cpu(), rollouts, observed)
        distance = stats.divergence[:, 0] if measure else (stats.logprob_T - stats.logprob_S).abs()
        sizes = [len(labels) for labels in micro.labels]
        by_answer = zip(
            micro.rollouts,
            torch.split(stats.logprob_S.cpu(), sizes),
            torch.split(stats.logprob_T.cpu(), sizes, dim=1),
            torch.split((micro.teacher_weight_KN * distance).sum(0), sizes),
            strict=True,
        )
        for index, logprob_S, logprob_T, gap in by_answer:
            # Clones: a view would travel to the other processes, and be kept, with the whole micro-batch.
            by_teacher = {n: row.clone() for n, row in zip(micro.teachers, logprob_T, strict=True)}
            own = {name: ratios[index].clone() for name, ratios in spans.items()}
            found[index] = Before(logprob_S.clone(), by_teacher, float(gap.sum()), own)
    return {index: before for part in parts.ranks.gather(found) for index, before in part.items()}


def _spans(
    parts: Parts, pack: Pack, logprob_S: Tensor, rollouts: Sequence[Rollout], observed: Observed
) -> dict[str, dict[int, Tensor]]:
    """By teacher with such a bridge and by answer: each group's log-ratio at each of its tokens."""
    lengths = [rollouts[i].num_trained for i in pack.rollouts]
    found = {}
    for name, logprob_T in observed.spans(parts, pack).items():
        own = [observed.alignments[name][i] for i in pack.rollouts]
        ratio = group_logratio(logprob_S, logprob_T.cpu(), pack_groups(own, lengths, logprob_S.device))
        found[name] = dict(zip(pack.rollouts, torch.split(ratio, lengths), strict=True))
    return found
