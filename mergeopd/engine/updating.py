"""One optimizer update: packs by teacher set, their gradients, and what is worth telling about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mergeopd.engine.batch import PreparedUpdate, micro_batch
from mergeopd.engine.build import Parts
from mergeopd.engine.canary import refuse_uniform
from mergeopd.engine.samples import SampleTaker
from mergeopd.engine.schedule import Pack
from mergeopd.loss.fused import TokenStats
from mergeopd.loss.objective import DistillationObjective
from mergeopd.report.events import DomainStats, Reporter, StageProgress, StageStarted, TeacherStats
from mergeopd.student.batch import MicroBatch
from mergeopd.teacher.cache import HiddenCache
from mergeopd.types import Rollout


@dataclass
class _Sums:
    """Running sums over the tokens of one teacher or domain."""

    num_tokens: int = 0
    values: dict[str, float] = field(default_factory=dict)

    def add(self, num_tokens: int, **sums: float) -> None:
        self.num_tokens += num_tokens
        for name, value in sums.items():
            self.values[name] = self.values.get(name, 0.0) + value

    def mean(self, name: str) -> float:
        return self.values[name] / self.num_tokens if self.num_tokens else 0.0


class UpdateStats:
    """Collects the statistics of an update's micro-batches."""

    def __init__(self, objective: DistillationObjective) -> None:
        self._names = objective.names
        self._teachers: dict[str, _Sums] = {}
        self._domains: dict[str, _Sums] = {}
        self.loss = 0.0

    def add(self, micro: MicroBatch, prepared: PreparedUpdate, stats: TokenStats) -> None:
        """Book one micro-batch."""
        self.loss += float(stats.loss.sum())
        gap = stats.logprob_T - stats.logprob_S
        for k, name in enumerate(micro.teachers):
            divergence = {d: float(stats.divergence[k, i].sum()) for i, d in enumerate(self._names)}
            self._teachers.setdefault(name, _Sums()).add(
                gap.shape[1], gap=float(gap[k].sum()), entropy=float(stats.entropy_T[k].sum()), **divergence
            )
        sizes = [len(labels) for labels in micro.labels]
        per_rollout = zip(
            micro.rollouts,
            torch.split(stats.logprob_S, sizes),
            torch.split(stats.entropy_S, sizes),
            strict=True,
        )
        for index, logprob, entropy in per_rollout:
            domain = prepared.rollouts[index].rollout.prompt.domain
            self._domains.setdefault(domain, _Sums()).add(
                len(logprob), nll=-float(logprob.sum()), entropy=float(entropy.sum())
            )

    def teachers(self) -> dict[str, TeacherStats]:
        """Per teacher, over its tokens."""
        return {
            name: TeacherStats(
                num_tokens=sums.num_tokens,
                divergence={d: sums.mean(d) for d in self._names},
                logprob_gap=sums.mean("gap"),
                entropy_T=sums.mean("entropy"),
            )
            for name, sums in sorted(self._teachers.items())
        }

    def refuse_uniform_teachers(self, num_valid: int) -> None:
        """Raise TeacherError for a teacher to which all tokens were alike."""
        for name, sums in self._teachers.items():
            if sums.num_tokens:
                refuse_uniform(name, sums.mean("entropy"), num_valid)

    def domains(self, prepared: PreparedUpdate, rewards: Sequence[float | None]) -> dict[str, DomainStats]:
        """Per domain, over its rollouts; `rewards` are the round's."""
        total = sum(sums.num_tokens for sums in self._domains.values())
        result = {}
        for domain, sums in sorted(self._domains.items()):
            members = {
                i: p.rollout for i, p in prepared.rollouts.items() if p.rollout.prompt.domain == domain
            }
            known = [r for i in members if (r := rewards[i]) is not None]
            result[domain] = DomainStats(
                num_rollouts=len(members),
                num_tokens=sums.num_tokens,
                mean_length=sums.num_tokens / len(members),
                token_share=sums.num_tokens / total,
                weight=prepared.budgets.get(domain, 0.0),
                nll=sums.mean("nll"),
                entropy_S=sums.mean("entropy"),
                truncated_fraction=_truncated(list(members.values())),
                reward=sum(known) / len(known) if known else None,
            )
        return result


def accumulate(
    parts: Parts,
    objective: DistillationObjective,
    prepared: PreparedUpdate,
    packs: Sequence[Pack],
    cache: HiddenCache,
    samples: SampleTaker,
    reporter: Reporter,
) -> UpdateStats:
    """Add up the gradient of an update. One teacher set's heads are in memory at a time."""
    stats = UpdateStats(objective)
    reporter.emit(StageStarted("update", "", len(packs), "micro-batches"))
    for done, pack in enumerate(packs, start=1):
        heads = parts.store.heads(pack.teachers) if objective.divergences else {}
        for name, head in heads.items():
            parts.canaries.verify(name, head)
        micro = micro_batch(pack, prepared, cache, heads, parts.device, parts.student.statistics_dtype)
        tokens = parts.student.accumulate(micro, objective)
        stats.add(micro, prepared, tokens)
        samples.take(micro, prepared, tokens)
        reporter.emit(StageProgress(done))
    return stats


def _truncated(rollouts: Sequence[Rollout]) -> float:
    return sum(r.finish == "length" for r in rollouts) / len(rollouts)
