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
    ready answer from the dataset, each where the source has one: a text, or a logged trajectory, whose first
    and last messages are the assistant's. `fields` are the row's other columns that some
    teacher's own prompt shows, by name.
    """

    key: str
    source: str
    domain: str
    messages: tuple[Message, ...]
    teachers: Mapping[str, float] = field(default_factory=dict)
    reference: str | None = None
    response: str | tuple[Message, ...] | None = None
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rollout:
    """One answer, as token ids that are never re-tokenised.

    `prompt_ids` is the student's rendering. `response_ids` includes the stop token when one was written.
    `logprobs_behaviour` are the natural log-probabilities under the exact distribution that was sampled from
    (true vocabulary, temperature and top-p applied), one per response token; None for text that no policy
    of this run wrote.
    `policy_version` counts the optimizer updates that the writing student had seen.
    `trained` has a flag per response token: False for what others wrote between the assistant's turns (tools,
    users, the template's headers), which is read but never in the loss. None: all of it is in the loss.
    """

    prompt: Prompt
    sample: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    origin: Origin
    finish: Finish
    logprobs_behaviour: tuple[float, ...] | None = None
    policy_version: int = 0
    trained: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        if self.trained is not None and len(self.trained) != len(self.response_ids):
            raise ValueError(f"{len(self.trained)} flags for {len(self.response_ids)} response tokens")

    @property
    def trained_ids(self) -> tuple[int, ...]:
        """The response tokens that are in the loss, in order."""
        if self.trained is None:
            return self.response_ids
        return tuple(i for i, own in zip(self.response_ids, self.trained, strict=True) if own)

    @property
    def num_trained(self) -> int:
        """How many response tokens are in the loss."""
        return len(self.response_ids) if self.trained is None else sum(self.trained)

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
