"""metrics.jsonl: each update as one line for plotting tools; rollouts/samples.jsonl: answers token by token.

    pandas.json_normalize(map(json.loads, open("metrics.jsonl")))   # columns like teachers.math.reverse_kl

Everything that depends on the machine or on restarts stands under `cost`: two runs of one plan differ in that
key only.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mergeopd.report.events import (
    DomainStats,
    Event,
    RolloutSampled,
    StageStarted,
    TeacherStats,
    UpdateDone,
)
from mergeopd.storage.metrics import MetricsFile


def update_record(event: UpdateDone) -> dict[str, Any]:
    """The line of one update: always the same keys in the same order, teachers and domains sorted by name."""
    seconds = dict(sorted(event.seconds.items()))
    return {
        "update": event.update,
        "phase": event.phase,
        "round": event.round,
        "lr": event.lr,
        "loss": event.loss,
        "grad_norm": event.grad_norm,
        "clip_factor": event.clip_factor,
        "num_tokens": event.num_tokens,
        "on_policy_fraction": event.on_policy_fraction,
        "teachers": {name: _teacher_record(stats) for name, stats in sorted(event.teachers.items())},
        "domains": {name: _domain_record(stats) for name, stats in sorted(event.domains.items())},
        "policy": {} if event.policy is None else asdict(event.policy),
        "cost": {
            "seconds": seconds,
            "tokens_per_s": event.num_tokens / event.step_s if event.step_s > 0 else None,
            "teacher_bytes_read": event.teacher_bytes_read,
        },
    }


def _teacher_record(stats: TeacherStats) -> dict[str, Any]:
    record = {
        "num_tokens": stats.num_tokens,
        **dict(sorted(stats.divergence.items())),
        "logprob_gap": stats.logprob_gap,
    }
    if stats.bridge is None:
        return {**record, "entropy_T": stats.entropy_T}
    return record | {key: value for key, value in asdict(stats.bridge).items() if value is not None}


def _domain_record(stats: DomainStats) -> dict[str, Any]:
    return {
        "num_rollouts": stats.num_rollouts,
        "num_tokens": stats.num_tokens,
        "mean_length": stats.mean_length,
        "token_share": stats.token_share,
        "weight": stats.weight,
        "loss_share": stats.loss_share,
        "nll": stats.nll,
        "entropy_S": stats.entropy_S,
        "reward": stats.reward,
        "truncated_fraction": stats.truncated_fraction,
    }


def sample_record(event: RolloutSampled) -> dict[str, Any]:
    """The line of one sampled answer in rollouts/samples.jsonl."""
    return {
        "update": event.update,
        "phase": event.phase,
        "domain": event.domain,
        "key": event.key,
        "origin": event.origin,
        "finish": event.finish,
        "reward": event.reward,
        "prompt": event.prompt,
        "tokens": event.tokens,
        "trained": event.trained,
        "logprob_S": event.logprob_S,
        "divergence": event.divergence,
        "teachers": {
            name: {
                "divergence": trace.divergence,
                "logprob_T": trace.logprob_T,
                "masked": trace.masked,
            }
            for name, trace in sorted(event.teachers.items())
        },
    }


class JsonlReporter:
    """Writes updates to a metrics file; its lines are on the disk before a checkpoint that counts them is."""

    def __init__(self, file: MetricsFile) -> None:
        self._file = file

    def emit(self, event: Event) -> None:
        """Append the line of an `UpdateDone`; other events have none.

        Raises:
            StorageError: the disk refuses.
        """
        if isinstance(event, UpdateDone):
            self._file.append(update_record(event))
        elif isinstance(event, StageStarted) and event.stage == "checkpoint":
            self._file.sync()


class SamplesReporter:
    """Writes sampled answers to a file of their own; its lines are on the disk before a checkpoint is."""

    def __init__(self, file: MetricsFile) -> None:
        self._file = file

    def emit(self, event: Event) -> None:
        """Append the line of a `RolloutSampled`; other events have none.

        Raises:
            StorageError: the disk refuses.
        """
        if isinstance(event, RolloutSampled):
            self._file.append(sample_record(event))
        elif isinstance(event, StageStarted) and event.stage == "checkpoint":
            self._file.sync()
