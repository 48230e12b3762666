"""Samples of responses with statistics per token, for the report. Read-only for training."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from mergeopd.batch.micro_batch import MicroBatch
from mergeopd.batch.records import PreparedUpdate
from mergeopd.distributed.communicator import Communicator
from mergeopd.loss.fused import TokenStats
from mergeopd.loss.objective import DistillationObjective
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.reporting.events import RolloutSampled, TeacherTrace
from mergeopd.types import Rollout

PER_DOMAIN = 2
_TIMES = 20
# The number of tokens that a decoder depends on (spaces between words, bytes of a character).
_CONTEXT = 8


def is_due(update: int, num_updates: int) -> bool:
    """Whether update number `update` (from 1) of `num_updates` is sampled: the first, the last, every 5 %."""
    return update in (1, num_updates) or update % max(1, num_updates // _TIMES) == 0


def choose(rollouts: Sequence[Rollout], update: Sequence[int]) -> tuple[int, ...]:
    """Return the first responses of each domain in the update, to different prompts, none empty."""
    prompts: dict[str, set[str]] = {}
    chosen = []
    for index in update:
        prompt = rollouts[index].prompt
        seen = prompts.setdefault(prompt.domain, set())
        if rollouts[index].num_trained and prompt.key not in seen and len(seen) < PER_DOMAIN:
            seen.add(prompt.key)
            chosen.append(index)
    return tuple(chosen)


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return the text of each token, special ones included; concatenated, they are the response.

    Tokens with a part of a character are empty, except for the one that completes it; characters that
    stay incomplete are U+FFFD.
    """
    texts = []
    start = done = 0  # ids[start:done] is context whose text was returned
    for position in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[start:done], skip_special_tokens=False)
        text = tokenizer.decode(ids[start:position], skip_special_tokens=False)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and position < len(ids):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        start, done = max(start, position - _CONTEXT), position
    return tuple(texts)


@dataclass
class SampleTaker:
    """Collects the statistics of the chosen responses from an update's micro-batches."""

    chosen: Collection[int]
    objective: DistillationObjective
    _logprob_S: dict[int, tuple[float | None, ...]] = field(default_factory=dict, init=False)
    _teachers: dict[int, dict[str, TeacherTrace]] = field(default_factory=dict, init=False)

    def take(self, micro: MicroBatch, prepared: PreparedUpdate, stats: TokenStats) -> None:
        end = 0
        measured = self.objective.measured(stats)
        for index, labels in zip(micro.rollouts, micro.labels, strict=True):
            rows = slice(end, end + len(labels))
            end = rows.stop
            if index not in self.chosen:
                continue
            member = prepared.rollouts[index]
            places = _places(member.rollout)
            num_tokens = len(member.rollout.response_ids)
            self._logprob_S[index] = _at(places, _numbers(stats.logprob_S[rows]), num_tokens)
            self._teachers[index] = {
                name: TeacherTrace(
                    divergence=_at(places, _numbers(measured[k, 0, rows]), num_tokens),
                    logprob_T=_at(places, _numbers(stats.logprob_T[k, rows]), num_tokens),
                    masked=tuple(places[row] for row in member.eos_masked.get(name, ())),
                )
                for k, name in enumerate(micro.teachers)
            }

    def together(self, ranks: Communicator) -> None:
        """Gather the statistics of all processes. Collective, if any response was chosen."""
        if self.chosen:
            for logprob_S, teachers in ranks.gather((self._logprob_S, self._teachers)):
                self._logprob_S |= logprob_S
                self._teachers |= teachers

    def events(
        self,
        update: int,
        phase: str,
        rollouts: Sequence[Rollout],
        rewards: Sequence[float | None],
        tokenizer: Tokenizer,
    ) -> tuple[RolloutSampled, ...]:
        """Return the chosen responses by domain; `rollouts` and `rewards` are the round's."""
        events = []
        for index in sorted(self._logprob_S, key=lambda i: (rollouts[i].prompt.domain, i)):
            rollout, teachers = rollouts[index], self._teachers[index]
            events.append(
                RolloutSampled(
                    update=update,
                    phase=phase,
                    domain=rollout.prompt.domain,
                    key=rollout.prompt.key,
                    prompt=tokenizer.decode(rollout.prompt_ids.tolist(), skip_special_tokens=False),
                    tokens=token_texts(rollout.response_ids.tolist(), tokenizer),
                    logprob_S=self._logprob_S[index],
                    divergence=self.objective.measures[0] if teachers else "",
                    teachers=teachers,
                    reward=rewards[index],
                    origin=rollout.origin,
                    finish=rollout.finish,
                    trained=None if rollout.trained is None else tuple(rollout.trained.tolist()),
                )
            )
        return tuple(events)


def _places(rollout: Rollout) -> list[int]:
    if rollout.trained is None:
        return list(range(len(rollout.response_ids)))
    places: list[int] = rollout.trained.nonzero()[0].tolist()
    return places


def _at(places: Sequence[int], values: Sequence[float], length: int) -> tuple[float | None, ...]:
    numbers: list[float | None] = [None] * length
    for place, value in zip(places, values, strict=True):
        numbers[place] = value
    return tuple(numbers)


def _numbers(values: torch.Tensor) -> tuple[float, ...]:
    """Convert to floats of six digits."""
    return tuple(float(f"{value:.6g}") for value in values.tolist())
