"""Samples of responses with statistics per token, for the report. Read-only for training."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from mergeopd.batch.micro_batch import MicroBatch
from mergeopd.batch.records import PreparedUpdate
from mergeopd.distributed.communicator import Communicator
from mergeopd.loss.fused import TokenStats
from mergeopd.loss.heads import Hidden
from mergeopd.loss.objective import DistillationObjective
from mergeopd.loss.observe import top_logits
from mergeopd.loss.targets import TopK
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.reporting.events import Candidates, RolloutSampled, TeacherTrace
from mergeopd.types import Rollout

PER_DOMAIN = 2
NUM_CANDIDATES = 3
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


@dataclass(frozen=True, slots=True)
class _Top:
    """The largest logits of a shard of the vocabulary at each trained token, and the log of its mass."""

    ids: list[list[int]]
    logits: list[list[float]]
    log_mass: list[float]

    @classmethod
    def of(cls, target: Hidden | TopK, rows: slice, temperature: float) -> _Top:
        if isinstance(target, Hidden):
            parts = top_logits(target.hidden[rows], target.head, NUM_CANDIDATES, temperature=temperature)
            return cls(*(part.tolist() for part in parts))
        logprobs, order = target.logprobs[rows].topk(min(NUM_CANDIDATES, target.k), dim=1)
        return cls(target.ids[rows].gather(1, order).tolist(), logprobs.tolist(), [0.0] * len(order))


@dataclass
class SampleTaker:
    """Collects the statistics of the chosen responses from an update's micro-batches."""

    chosen: Collection[int]
    objective: DistillationObjective
    # By first token id of the shard.
    _top_S: dict[int, dict[int, _Top]] = field(default_factory=dict, init=False)
    _top_T: dict[tuple[int, str], dict[int, _Top]] = field(default_factory=dict, init=False)
    _logprob_S: dict[int, tuple[float | None, ...]] = field(default_factory=dict, init=False)
    _teachers: dict[int, dict[str, TeacherTrace]] = field(default_factory=dict, init=False)

    def look_at_student(self, micro: MicroBatch, student: Hidden) -> None:
        """Find the student's most probable tokens among this rank's rows of the head."""
        for index, rows in self._chosen_rows(micro):
            top = _Top.of(student, rows, self.objective.temperature)
            self._top_S.setdefault(index, {})[student.head.vocab.start] = top

    def look_at_teachers(self, micro: MicroBatch) -> None:
        """Find the teachers' most probable tokens, where a target shows them, before it is released."""
        for index, rows in self._chosen_rows(micro):
            for name, target in zip(micro.teachers, micro.targets, strict=True):
                if isinstance(target, Hidden | TopK):
                    shard = target.head.vocab.start if isinstance(target, Hidden) else 0
                    top = _Top.of(target, rows, self.objective.temperature)
                    self._top_T.setdefault((index, name), {})[shard] = top

    def take(self, micro: MicroBatch, prepared: PreparedUpdate, stats: TokenStats) -> None:
        measured = self.objective.measured(stats)
        for index, rows in self._chosen_rows(micro):
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
            own = (self._logprob_S, self._teachers, self._top_S, self._top_T)
            for logprob_S, teachers, top_S, top_T in ranks.gather(own):
                self._logprob_S |= logprob_S
                self._teachers |= teachers
                for index, of_student in top_S.items():
                    self._top_S.setdefault(index, {}).update(of_student)
                for key, of_teacher in top_T.items():
                    self._top_T.setdefault(key, {}).update(of_teacher)

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
            text_of = TokenText(tokenizer, int(rollout.prompt_ids[-1]))
            traces = {
                name: replace(trace, candidates=_candidates(self._top_T.get((index, name)), rollout, text_of))
                for name, trace in teachers.items()
            }
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
                    teachers=traces,
                    reward=rewards[index],
                    origin=rollout.origin,
                    finish=rollout.finish,
                    trained=None if rollout.trained is None else tuple(rollout.trained.tolist()),
                    reference=rollout.prompt.reference,
                    candidates=_candidates(self._top_S.get(index), rollout, text_of),
                )
            )
        return tuple(events)

    def _chosen_rows(self, micro: MicroBatch) -> Iterator[tuple[int, slice]]:
        """Yield the chosen responses of a micro-batch, by index in the round, with their rows."""
        end = 0
        for index, labels in zip(micro.rollouts, micro.labels, strict=True) if self.chosen else ():
            rows = slice(end, end + len(labels))
            end = rows.stop
            if index in self.chosen:
                yield index, rows


class TokenText:
    """Texts of single tokens as they read after `context`: some decoders drop the space of a first token."""

    def __init__(self, tokenizer: Tokenizer, context: int) -> None:
        self._decode = partial(tokenizer.decode, skip_special_tokens=False)
        self._context = context
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            before = self._decode([self._context])
            self._known[token] = self._decode([self._context, token])[len(before) :]
        return self._known[token]


def _candidates(shards: Mapping[int, _Top] | None, rollout: Rollout, texts: TokenText) -> Candidates | None:
    """Combine the shards of a vocabulary into the most probable tokens of each position."""
    if shards is None:
        return None
    rows: list[tuple[tuple[str, float], ...] | None] = [None] * len(rollout.response_ids)
    for row, place in enumerate(_places(rollout)):
        log_mass = float(np.logaddexp.reduce([top.log_mass[row] for top in shards.values()]))
        pairs = [pair for top in shards.values() for pair in zip(top.logits[row], top.ids[row], strict=True)]
        best = sorted(pairs, reverse=True)[:NUM_CANDIDATES]
        rows[place] = tuple((texts[token], float(f"{logit - log_mass:.6g}")) for logit, token in best)
    return tuple(rows)


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
