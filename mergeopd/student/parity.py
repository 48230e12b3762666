"""Compare a rollout engine's log-probabilities with those of the student under training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mergeopd.batch.collate import micro_batch
from mergeopd.batch.micro_batch import MicroBatch, Stream, with_statistics
from mergeopd.batch.packing import pack
from mergeopd.batch.records import PreparedRollout, PreparedUpdate
from mergeopd.distributed.communicator import Communicator
from mergeopd.errors import ServingError
from mergeopd.student.loss import Measured
from mergeopd.student.protocol import Trainable
from mergeopd.types import Rollout


@dataclass(frozen=True, slots=True)
class LogprobGap:
    """|engine - student| over sampled tokens, in nats: mean and maximum.

    `kl` estimates KL(engine || student) per token as mean(exp(d) - 1 - d) with d = student - engine, whose
    terms are not negative (Schulman 2020, "Approximating KL divergence").
    """

    mean: float
    max: float
    kl: float


def refuse_gap(gap: LogprobGap, bound: float) -> None:
    """Raise ServingError for a gap above `bound`, with the usual causes."""
    raise ServingError(
        f"the servers' log-probabilities of sampled tokens differ from the student's by {gap.mean:.3g} nats "
        f"on average (at most {gap.max:.3g}; `rollout.parity.max_mean_gap` is {bound:g}); usual causes: "
        "another dtype than student.dtype, cached states of older weights (prefix cache), sampling defaults "
        "of the server (generation_config), log-probabilities before temperature, quantised weights, or "
        "another model at the address"
    )


def logprob_gap(
    student: Trainable,
    rollouts: Sequence[Rollout],
    temperature: float,
    max_tokens: int,
    device: torch.device,
    ranks: Communicator,
) -> LogprobGap:
    """Score rollouts with the student's current weights and compare with their behaviour log-probabilities.

    The rollouts were sampled at `temperature` from the whole vocabulary. Forward passes take at most
    `max_tokens` tokens. Collective.
    """
    # Without teachers, so that responses of all domains are packed together.
    own = [replace(r, prompt=replace(r.prompt, teachers={}, term_teachers={})) for r in rollouts]
    placement = student.placement
    packs = pack(own, range(len(own)), max_tokens, 0)[placement.dp_rank :: len(placement.replica_ranks)]
    update = PreparedUpdate({i: PreparedRollout(r, 1.0, {}, {}) for i, r in enumerate(own)}, {})
    like = torch.empty((), dtype=student.statistics_dtype, device=device)

    def micro_batches() -> Iterator[MicroBatch]:
        for part in packs:
            yield micro_batch(part, update, {}, {}, like, with_policy=False)

    stream = Stream(micro_batches(), len(packs))
    scored = with_statistics(stream, lambda them: student.score(them, Measured((), None, temperature)))
    differences = [np.zeros(0)]
    for micro, stats in scored if placement.reports_stats else ():
        engine = [own[i].trained_logprobs for i in micro.rollouts]
        known = np.concatenate([row for row in engine if row is not None])
        differences.append(stats.logprob_S.double().cpu().numpy() - known)
    every = np.concatenate(ranks.gather(np.concatenate(differences)))
    return LogprobGap(
        float(np.abs(every).mean()), float(np.abs(every).max()), float((np.expm1(every) - every).mean())
    )
