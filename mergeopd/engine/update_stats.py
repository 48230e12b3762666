"""Statistics of an update: sums over micro-batches and processes, and the figures computed from them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergeopd.batch.micro_batch import MicroBatch
from mergeopd.batch.records import PreparedUpdate
from mergeopd.distributed.communicator import Communicator
from mergeopd.loss.objective import DistillationObjective
from mergeopd.loss.overlap import Overlap
from mergeopd.loss.policy import Policy, PolicyRows, policy_tokens
from mergeopd.reporting.events import BridgeFigures, DomainStats, PolicyStats, TeacherStats
from mergeopd.student.loss import MicroStats
from mergeopd.teacher.canary import refuse_uniform
from mergeopd.teacher.token_view import TokenView
from mergeopd.transfers import to_device
from mergeopd.types import Episode, Rollout, TokenIds

# A 4-gram's hash is the sum of its ids times these odd numbers, modulo 2**64.
_HASH = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93], np.uint64)

# Servers that return log-probabilities of single tokens do not tell the entropy: it is NaN.
_MAY_BE_UNKNOWN = ("entropy", "entropy_gap")


@dataclass
class Sums:
    """Running sums over the tokens of one teacher or domain."""

    num_tokens: int = 0
    values: dict[str, float] = field(default_factory=dict)

    def add(self, num_tokens: int, **sums: float) -> None:
        self.num_tokens += num_tokens
        for name, value in sums.items():
            self.values[name] = self.values.get(name, 0.0) + value

    def mean(self, name: str) -> float:
        return self.values.get(name, 0.0) / self.num_tokens if self.num_tokens else 0.0


@dataclass
class Tally:
    """All sums over an update; those of several copies of the student can be added."""

    whole: Sums = field(default_factory=Sums)
    largest_gap: float = 0.0
    policy: Sums = field(default_factory=Sums)
    teachers: defaultdict[str, Sums] = field(default_factory=lambda: defaultdict(Sums))
    domains: defaultdict[str, Sums] = field(default_factory=lambda: defaultdict(Sums))

    def add(self, other: Tally) -> None:
        self.largest_gap = max(self.largest_gap, other.largest_gap)
        for own, sums in ((self.whole, other.whole), (self.policy, other.policy)):
            own.add(sums.num_tokens, **sums.values)
        for mine, others in ((self.teachers, other.teachers), (self.domains, other.domains)):
            for name, sums in others.items():
                mine[name].add(sums.num_tokens, **sums.values)


class Later:
    """Numbers on a device that belong to sums in main memory, where they are read together, once."""

    def __init__(self) -> None:
        self._sums: list[tuple[Sums, tuple[str, ...], Tensor]] = []
        self._gaps: list[Tensor] = []

    def add(self, sums: Sums, **numbers: Tensor) -> None:
        """Add scalars to `sums`, by name; an unknown entropy, which is NaN, is left out."""
        self._sums.append((sums, tuple(numbers), torch.stack([one.double() for one in numbers.values()])))

    def add_gap(self, gap: Tensor) -> None:
        """Take the largest of these gaps into account."""
        self._gaps.append(gap.max().double())

    def read(self, tally: Tally) -> None:
        """Add everything to the sums, and the largest gap to `tally`. Waits for each device once."""
        gaps = [(None, ("",), gap.unsqueeze(0)) for gap in self._gaps]
        for device in {values.device for _, _, values in (*self._sums, *gaps)}:
            own = [entry for entry in (*self._sums, *gaps) if entry[2].device == device]
            numbers = iter(torch.cat([values for _, _, values in own]).tolist())
            for sums, names, _ in own:
                values = {name: next(numbers) for name in names}
                if sums is None:
                    tally.largest_gap = max(tally.largest_gap, *values.values())
                    continue
                unknown = [name for name in _MAY_BE_UNKNOWN if math.isnan(values.get(name, 0.0))]
                sums.add(0, **{name: value for name, value in values.items() if name not in unknown})
        self._sums, self._gaps = [], []


@dataclass
class UpdateStats:
    """Collects the statistics of an update's micro-batches, which stay on their device until `together`."""

    objective: DistillationObjective
    _tally: Tally = field(default_factory=Tally, init=False)
    _later: Later = field(default_factory=Later, init=False)

    @property
    def loss(self) -> float:
        return self._tally.whole.values.get("loss", 0.0)

    def together(self, ranks: Communicator) -> None:
        """Sum over all processes; all have the result. Collective."""
        self._later.read(self._tally)
        first, *others = ranks.gather(self._tally)
        for tally in others:
            first.add(tally)
        self._tally = first

    def add(self, micro: MicroBatch, prepared: PreparedUpdate, stats: MicroStats) -> None:
        self._add_bridged(micro, prepared, stats)
        self._later.add(self._tally.whole, loss=stats.loss.sum())
        gap = stats.logprob_T - stats.logprob_S
        measured = self.objective.measured(stats)
        sizes = [len(labels) for labels in micro.labels]
        is_own = _is_own(sizes, micro.rollouts, prepared, gap.device)
        for k, name in enumerate(micro.teachers):
            sums = self._tally.teachers[name]
            sums.add(gap.shape[1])
            self._later.add(
                sums,
                **{d: measured[k, i].sum() for i, d in enumerate(self.objective.measures)},
                entropy=stats.entropy_T[k].sum(),
                entropy_gap=(stats.entropy_T[k] - stats.entropy_S).abs().sum(),
            )
            self._add_gap(name, gap[k], is_own)
            if stats.overlap is not None:
                self._add_overlap(name, k, stats.overlap)
        per_rollout = zip(
            micro.rollouts,
            torch.split(stats.logprob_S, sizes),
            torch.split(stats.entropy_S, sizes),
            torch.split(stats.loss.abs(), sizes),
            strict=True,
        )
        for index, logprob, entropy, loss in per_rollout:
            rollout = prepared.rollouts[index].rollout
            num, num_distinct = _count_ngrams(rollout.trained_ids)
            sums = self._tally.domains[rollout.prompt.domain]
            sums.add(len(logprob), ngrams=num, distinct_ngrams=num_distinct)
            self._later.add(sums, nll=-logprob.sum(), entropy=entropy.sum(), loss=loss.sum())
        if self.objective.policy is not None and micro.policy is not None:
            members = [prepared.rollouts[i] for i in micro.rollouts]
            self._tally.policy.add(sum(m.rollout.num_trained for m in members if m.is_own))
            self._add_policy(self.objective.policy, micro.policy, micro.teacher_weight_KN, stats)

    def _add_bridged(self, micro: MicroBatch, prepared: PreparedUpdate, stats: MicroStats) -> None:
        """Add teachers with another tokenizer, whose means are over groups."""
        for name, seen in stats.bridged:
            self._later.add(self._tally.whole, loss=seen.loss.sum())
            sums = self._tally.teachers[name]
            sums.add(len(seen.value))
            self._later.add(sums, matched=seen.matched_T.sum(), bridge=seen.value.sum())
            sizes = [len(prepared.rollouts[i].alignments[name].student_starts) for i in micro.rollouts]
            gap = seen.logprob_T - seen.logprob_S
            self._add_gap(name, gap, _is_own(sizes, micro.rollouts, prepared, gap.device))
            for index, loss in zip(micro.rollouts, torch.split(seen.loss.abs(), sizes), strict=True):
                domain = prepared.rollouts[index].rollout.prompt.domain
                self._later.add(self._tally.domains[domain], loss=loss.sum())
        for index in micro.rollouts:
            member = prepared.rollouts[index]
            for name, own in member.alignments.items():
                sums = self._tally.teachers[name]
                in_groups = int((own.student_stops - own.student_starts).sum())
                sums.add(0, tokens=member.rollout.num_trained, aligned=in_groups)
            for name, ratio in member.spans.items():
                starts = torch.from_numpy(member.alignments[name].student_starts)
                of_groups = ratio[starts]
                sums = self._tally.teachers[name]
                sums.add(len(starts))
                self._later.add(sums, bridge=-of_groups.sum())
                self._add_gap(name, of_groups, _is_own([len(starts)], [index], prepared, ratio.device))

    def _add_gap(self, name: str, gap: Tensor, is_own: Tensor) -> None:
        """Add a teacher's log-prob gaps `[n]`, those of the student's own responses apart."""
        total, own, num_own = gap.sum().double(), torch.where(is_own, gap, 0.0).sum().double(), is_own.sum()
        self._later.add(
            self._tally.teachers[name],
            gap=total,
            gap_student=own,
            num_student=num_own,
            gap_text=total - own,
            num_text=len(gap) - num_own,
        )

    def _add_overlap(self, name: str, k: int, overlap: Overlap) -> None:
        """Add the overlap with teacher k, where its likeliest tokens are known, and common tokens apart."""
        advantage = overlap.advantage[k]
        self._later.add(
            self._tally.teachers[name],
            num_overlap=(~overlap.ratio[k].isnan()).sum(),
            num_overlap_advantage=(~advantage.isnan()).sum(),
            overlap=overlap.ratio[k].nansum(),
            shared_mass_S=overlap.mass_S[k].nansum(),
            shared_mass_T=overlap.mass_T[k].nansum(),
            overlap_advantage=advantage.nansum(),
        )

    def _add_policy(self, policy: Policy, rows: PolicyRows, weight_KN: Tensor, stats: MicroStats) -> None:
        tokens = policy_tokens(
            policy, rows, slice(0, len(rows.own_N)), stats.logprob_S, stats.logprob_T, weight_KN
        )
        gap = tokens.log_ratio_old.abs()
        self._later.add(
            self._tally.policy,
            corrected=tokens.is_corrected.sum(),
            clipped=tokens.is_clipped.sum(),
            gap=gap.sum(),
            weight=(tokens.weight * rows.own_N).sum(),
        )
        if gap.numel():
            self._later.add_gap(gap)

    def policy(self, zero_advantage_fraction: float | None) -> PolicyStats | None:
        """Return figures of the student's own tokens; None where the objective has no policy term."""
        if self.objective.policy is None:
            return None
        return PolicyStats(
            corrected_fraction=self._tally.policy.mean("corrected"),
            clipped_fraction=self._tally.policy.mean("clipped"),
            importance_weight=self._tally.policy.mean("weight"),
            rollout_logprob_gap=self._tally.policy.mean("gap"),
            rollout_logprob_gap_max=self._tally.largest_gap,
            zero_advantage_fraction=zero_advantage_fraction,
        )

    def teachers(self, views: Mapping[str, TokenView]) -> dict[str, TeacherStats]:
        """Return figures per teacher over its tokens, or over groups for teachers with a bridge."""
        return {
            name: self._plain(sums) if kind is None else self._bridged(kind, sums)
            for name, sums in sorted(self._tally.teachers.items())
            for kind in [views[name].bridge_kind]
        }

    def _plain(self, sums: Sums) -> TeacherStats:
        return TeacherStats(
            num_tokens=sums.num_tokens,
            divergence={d: sums.mean(d) for d in self.objective.measures},
            logprob_gap=sums.mean("gap"),
            logprob_gap_student=_gap(sums, "student"),
            logprob_gap_text=_gap(sums, "text"),
            entropy_T=sums.mean("entropy") if "entropy" in sums.values else None,
            entropy_gap=sums.mean("entropy_gap") if "entropy_gap" in sums.values else None,
            overlap=_mean(sums, "overlap", "num_overlap"),
            overlap_advantage=_mean(sums, "overlap_advantage", "num_overlap_advantage"),
            shared_mass_S=_mean(sums, "shared_mass_S", "num_overlap"),
            shared_mass_T=_mean(sums, "shared_mass_T", "num_overlap"),
        )

    def _bridged(self, kind: str, sums: Sums) -> TeacherStats:
        tokens, aligned = sums.values.get("tokens", 0.0), sums.values.get("aligned", 0.0)
        compares = bool(sums.num_tokens) and kind in ("pieces", "gold", "projection")
        return TeacherStats(
            num_tokens=int(tokens),
            # The mean over no group is not 0, which would look like a student equal to its teacher.
            divergence={kind: sums.mean("bridge") if sums.num_tokens else None},
            logprob_gap=sums.mean("gap") if sums.num_tokens else None,
            logprob_gap_student=_gap(sums, "student"),
            logprob_gap_text=_gap(sums, "text"),
            bridge=BridgeFigures(
                num_groups=sums.num_tokens,
                unaligned_fraction=1.0 - aligned / tokens if tokens else 0.0,
                tokens_per_group=aligned / sums.num_tokens if sums.num_tokens else 0.0,
                matched_fraction=sums.mean("matched") if compares else None,
            ),
        )

    def refuse_uniform_teachers(self, num_valid: int) -> None:
        """Raise TeacherError for a teacher with uniform distributions, where its entropy is known."""
        for name, sums in self._tally.teachers.items():
            if sums.num_tokens and "entropy" in sums.values:
                refuse_uniform(name, sums.mean("entropy"), num_valid, self.objective.temperature)

    def domains(
        self,
        rollouts: Mapping[int, Rollout],
        budgets: Mapping[str, float],
        rewards: Sequence[float | None],
    ) -> dict[str, DomainStats]:
        """Return figures per domain over the update's rollouts; `rewards` are the round's."""
        total = sum(sums.num_tokens for sums in self._tally.domains.values())
        loss = sum(sums.values["loss"] for sums in self._tally.domains.values())
        result = {}
        for domain, sums in sorted(self._tally.domains.items()):
            members = {i: rollout for i, rollout in rollouts.items() if rollout.prompt.domain == domain}
            known = [r for i in members if (r := rewards[i]) is not None]
            result[domain] = DomainStats(
                num_rollouts=len(members),
                num_tokens=sums.num_tokens,
                mean_length=sums.num_tokens / len(members),
                token_share=sums.num_tokens / total,
                weight=budgets.get(domain, 0.0),
                nll=sums.mean("nll"),
                entropy_S=sums.mean("entropy"),
                truncated_fraction=sum(r.finish == "length" for r in members.values()) / len(members),
                reward=sum(known) / len(known) if known else None,
                loss_share=sums.values["loss"] / loss if loss else None,
                repetition=_repeated(sums.values["ngrams"], sums.values["distinct_ngrams"]),
                **episode_stats([r.episode for r in members.values() if r.episode is not None]),
            )
        return result


def episode_stats(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Return the figures of responses with tools that `DomainStats` has; nothing without any."""
    if not episodes:
        return {}
    num_calls = sum(episode.num_calls for episode in episodes)
    num_failed = sum(episode.num_failed_calls for episode in episodes)
    return {
        "mean_turns": sum(episode.num_turns for episode in episodes) / len(episodes),
        "mean_calls": num_calls / len(episodes),
        "failed_call_fraction": num_failed / num_calls if num_calls else None,
    }


def repetition(responses: Sequence[TokenIds]) -> float | None:
    """Return the share of 4-grams that occurred earlier in their response; None if all are shorter."""
    counts = [_count_ngrams(ids) for ids in responses]
    return _repeated(sum(num for num, _ in counts), sum(num for _, num in counts))


def _count_ngrams(ids: TokenIds) -> tuple[int, int]:
    """Return the number of 4-grams of a response, and how many of them are distinct."""
    if len(ids) < len(_HASH):
        return 0, 0
    ngrams = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64), len(_HASH))
    return len(ngrams), len(np.unique(ngrams @ _HASH))


def _repeated(num_ngrams: float, num_distinct: float) -> float | None:
    return 1.0 - num_distinct / num_ngrams if num_ngrams else None


def _is_own(
    sizes: Sequence[int], rollouts: Sequence[int], prepared: PreparedUpdate, device: torch.device
) -> Tensor:
    """Whether the student generated each position, `[sum(sizes)]`; `sizes` are the rollouts' positions."""
    own = torch.tensor([prepared.rollouts[i].rollout.origin == "student" for i in rollouts])
    return to_device(own.repeat_interleave(torch.tensor(sizes)), device)


def _gap(sums: Sums, who: str) -> float | None:
    """Return the mean log-prob gap on text of one origin, `student` or (others') `text`; None without any."""
    return _mean(sums, f"gap_{who}", f"num_{who}")


def _mean(sums: Sums, name: str, count: str) -> float | None:
    """Return the mean over the tokens that are counted under another name; None without any."""
    num = sums.values.get(count, 0.0)
    return sums.values[name] / num if num else None
