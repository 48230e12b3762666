"""Immutable records shared by all packages. Importing this imports neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Origin = Literal["student", "teacher", "dataset"]
Finish = Literal["eos", "stop", "length"]

# An entry per token. In quotes, so that numpy need not be imported.
TokenIds: TypeAlias = "NDArray[np.int32]"
Routes: TypeAlias = "NDArray[np.unsignedinteger]"
Flags: TypeAlias = "NDArray[np.bool_]"
LogProbs: TypeAlias = "NDArray[np.float32] | NDArray[np.float64]"

# Keys of a message with its reasoning, as transformers reads them. The first is that of most templates.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class Message:
    """One chat turn; `content` is its text.

    `fields` are all keys of a message that has more than role and content (`tool_calls`, `tool_call_id`,
    `reasoning_content`, content as a list of parts), as JSON values in the order of the row: chat templates
    get them as they are. Empty: role and content only.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def tool_calls(self) -> Sequence[Mapping[str, Any]]:
        """The calls of tools, as templates get them: arguments are objects."""
        return self.fields.get("tool_calls") or ()

    @property
    def reasoning(self) -> Any:
        """The reasoning before the text, under any of the names that rows use; None: there is none."""
        values = (self.fields.get(name) for name in REASONING_KEYS)
        return next((value for value in values if value is not None), None)

    @property
    def is_empty(self) -> bool:
        """Whether there is neither text nor a call nor reasoning."""
        return not (self.content.strip() or self.tool_calls or self.reasoning)

    def without(self, *keys: str) -> Message:
        """Return the message without these keys; content that is null becomes an empty text."""
        if not self.fields.keys() & set(keys):
            return self
        fields = {key: value for key, value in self.fields.items() if key not in keys}
        return Message(self.role, self.content, {"content": self.content, **fields})


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of one source.

    `key` is unique in a run and stable over restarts (`"<source name>:<row>"`); random numbers and caches
    depend on it. `teachers` maps teacher names to nonzero weights (prompt weight x teacher weight), for all
    loss terms but those in `term_teachers`, which have teachers of their own. `writer` is the teacher that
    generates responses; None: the heaviest of `teachers`. `document` is text without a prompt; then there are
    no messages.
    `reference` is the verifier's reference answer, if any. `response` is a response from the dataset, if any:
    a text, or a logged trajectory whose first and last messages are the assistant's. `fields` are other
    columns of the row that teachers' prompts use, by name. `tools` are the JSON schemas of the functions that
    the assistant may call.
    """

    key: str
    source: str
    domain: str
    messages: tuple[Message, ...]
    teachers: Mapping[str, float] = field(default_factory=dict)
    reference: str | None = None
    response: str | tuple[Message, ...] | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()
    term_teachers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    writer: str | None = None
    document: Document | None = None

    @property
    def scorers(self) -> tuple[str, ...]:
        """Sorted names of the teachers that score its responses."""
        of_terms = (name for weights in self.term_teachers.values() for name in weights)
        return tuple(sorted({*self.teachers, *of_terms}))

    def teacher_weight(self, teacher: str, term: str) -> float:
        """Weight of a teacher in a loss term; 0 where it has no part in it."""
        return self.term_teachers.get(term, self.teachers).get(teacher, 0.0)


def token_ids(ids: Sequence[int] | NDArray[np.integer]) -> TokenIds:
    """Convert token ids to a read-only int32 array; an array of that type is not copied."""
    import numpy as np

    return _read_only(np.asarray(ids, np.int32))


def token_flags(flags: Sequence[bool] | Flags) -> Flags:
    """Convert flags to a read-only array; an array is not copied."""
    import numpy as np

    return _read_only(np.asarray(flags, np.bool_))


def token_logprobs(logprobs: Sequence[float] | LogProbs) -> LogProbs:
    """Convert numbers to a read-only array, in the precision given (float64 for Python's floats)."""
    import numpy as np

    array = np.asarray(logprobs)
    return _read_only(array if array.dtype == np.float32 else array.astype(np.float64, copy=False))


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    if not array.flags.writeable:
        return array
    view = array.view()
    view.flags.writeable = False
    return view


class ArrayRecord:
    """A frozen dataclass (`eq=False`) with arrays among its fields: equal where all fields are equal."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(
            _is_same(getattr(self, f.name), getattr(other, f.name))
            for f in fields(self)  # type: ignore[arg-type]
        )

    __hash__ = None  # type: ignore[assignment]


def _is_same(one: Any, other: Any) -> bool:
    import numpy as np

    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    return one is other or (one is not None and other is not None and bool(one == other))


@dataclass(frozen=True, slots=True, eq=False)
class Document(ArrayRecord):
    """Text without a prompt, in the student's tokens: `ids` are learned, `context_ids` precede them."""

    context_ids: TokenIds
    ids: TokenIds


@dataclass(frozen=True, slots=True, eq=False)
class Episode(ArrayRecord):
    """The turns of a response with tools.

    `messages` follow the prompt: the assistant's turns, and replies of tools and users. `final_ids` are the
    token ids of the last turn, which verifiers grade. `reward` is the environment's, if it gives one;
    `failure` is the reason why the environment ended the response.
    """

    messages: tuple[Message, ...]
    final_ids: TokenIds
    num_turns: int
    num_calls: int
    num_failed_calls: int
    reward: float | None = None
    failure: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Rollout(ArrayRecord):
    """A prompt with one response, as token ids that are never re-tokenised. Arrays are read-only.

    `prompt_ids` is the student's rendering. `response_ids` includes the stop token, if one was generated.
    `logprobs_behaviour` are the natural log-probabilities under the exact distribution that was sampled from
    (true vocabulary, temperature and top-p applied), one per response token, in float32, or in float64 where
    the policy computes in it; None for text that the student did not generate.
    `policy_version` is the number of optimizer updates of the student that generated the response.
    `trained` flags the response tokens in the loss: False for tokens between the assistant's turns (tools,
    users, template headers). None: all tokens are in the loss. `episode` has the turns of a response with
    tools. `routes` are the experts that computed the student's tokens, from the first of the prompt on, where
    they are to be replayed (`rollout/routes.py`).
    """

    prompt: Prompt
    sample: int
    prompt_ids: TokenIds
    response_ids: TokenIds
    origin: Origin
    finish: Finish
    logprobs_behaviour: LogProbs | None = None
    policy_version: int = 0
    trained: Flags | None = None
    episode: Episode | None = None
    routes: Routes | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", token_ids(self.prompt_ids))
        object.__setattr__(self, "response_ids", token_ids(self.response_ids))
        if self.logprobs_behaviour is not None:
            object.__setattr__(self, "logprobs_behaviour", token_logprobs(self.logprobs_behaviour))
        if self.trained is not None:
            object.__setattr__(self, "trained", token_flags(self.trained))
        if self.trained is not None and len(self.trained) != len(self.response_ids):
            raise ValueError(f"{len(self.trained)} flags for {len(self.response_ids)} response tokens")

    @property
    def trained_ids(self) -> TokenIds:
        """The response tokens that are in the loss, in order."""
        return self.response_ids if self.trained is None else self.response_ids[self.trained]

    @property
    def trained_logprobs(self) -> LogProbs | None:
        """`logprobs_behaviour` of the response tokens that are in the loss."""
        known = self.logprobs_behaviour
        return known if known is None or self.trained is None else known[self.trained]

    @property
    def final_ids(self) -> TokenIds:
        """The response tokens that a verifier grades: all, or the last turn of a response with tools."""
        return self.response_ids if self.episode is None else self.episode.final_ids

    @property
    def num_trained(self) -> int:
        """Number of response tokens in the loss."""
        return len(self.response_ids) if self.trained is None else int(self.trained.sum())

    @property
    def num_tokens(self) -> int:
        """Number of prompt and response tokens."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def teacher_set(self) -> tuple[str, ...]:
        """Sorted names of the teachers that score it; responses are packed by this key."""
        return self.prompt.scorers


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling settings. `temperature` 0 is greedy; `top_p` 1 keeps the whole vocabulary."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
