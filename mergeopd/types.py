"""Frozen records that cross rooms. No torch here: ids are plain integers, so `check` stays light."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Origin = Literal["student", "teacher", "dataset"]
Finish = Literal["eos", "stop", "length"]


@dataclass(frozen=True, slots=True)
class Message:
    """One chat turn; `content` is plain text."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of one source.

    `key` is unique in a run and stable over restarts (`"<source name>:<row>"`): randomness and caches hang
    on it. `teachers` maps a teacher's name to its weight for this prompt (prompt weight x card weight); a
    teacher with weight 0 does not appear. `reference` is what the verifier compares with, `response` a
    ready answer from the dataset, each where the source has one. `fields` are the row's other columns that
    some teacher's own prompt shows, by name.
    """

    key: str
    source: str
    domain: str
    messages: tuple[Message, ...]
    teachers: Mapping[str, float] = field(default_factory=dict)
    reference: str | None = None
    response: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rollout:
    """One answer, as token ids that are never re-tokenised.

    `prompt_ids` is the student's rendering. `response_ids` includes the stop token when one was written.
    `logprobs_behaviour` are the natural log-probabilities under the exact distribution that was sampled from
    (true vocabulary, temperature and top-p applied), one per response token; None for text that no policy
    of this run wrote.
    `policy_version` counts the optimizer updates that the writing student had seen.
    """

    prompt: Prompt
    sample: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    origin: Origin
    finish: Finish
    logprobs_behaviour: tuple[float, ...] | None = None
    policy_version: int = 0

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens together."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def teacher_set(self) -> tuple[str, ...]:
        """Names of the teachers of this prompt, sorted: the key by which updates are packed."""
        return tuple(sorted(self.prompt.teachers))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How text is sampled. `temperature` 0 is greedy; `top_p` 1 keeps the whole vocabulary."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
