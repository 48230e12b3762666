"""Immutable records shared by all packages. Token ids are plain integers, so that torch is not imported."""

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

    `key` is unique in a run and stable over restarts (`"<source name>:<row>"`); random numbers and caches
    depend on it. `teachers` maps teacher names to nonzero weights (prompt weight x teacher weight).
    `reference` is the verifier's reference answer, if any. `response` is a response from the dataset, if any:
    a text, or a logged trajectory whose first and last messages are the assistant's. `fields` are other
    columns of the row that teachers' prompts use, by name.
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
    """A prompt with one response, as token ids that are never re-tokenised.

    `prompt_ids` is the student's rendering. `response_ids` includes the stop token, if one was generated.
    `logprobs_behaviour` are natural log-probabilities under the sampling distribution (true vocabulary,
    temperature and top-p applied), one per response token; None for text that the student did not generate.
    `policy_version` is the number of optimizer updates of the student that generated the response.
    `trained` flags the response tokens in the loss: False for tokens between the assistant's turns (tools,
    users, template headers). None: all tokens are in the loss.
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
        """Number of response tokens in the loss."""
        return len(self.response_ids) if self.trained is None else sum(self.trained)

    @property
    def num_tokens(self) -> int:
        """Number of prompt and response tokens."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def teacher_set(self) -> tuple[str, ...]:
        """Sorted names of the prompt's teachers; responses are packed by this key."""
        return tuple(sorted(self.prompt.teachers))


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling settings. `temperature` 0 is greedy; `top_p` 1 keeps the whole vocabulary."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
