"""Interface between the round and rollout engines. Importing this does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mergeopd.types import (
    ArrayRecord,
    Finish,
    LogProbs,
    Message,
    Routes,
    Sampling,
    TokenIds,
    token_ids,
    token_logprobs,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mergeopd.loss.heads import Head


@dataclass(frozen=True, slots=True, eq=False)
class GenerationRequest(ArrayRecord):
    """One response to generate; `key` and `sample` identify its random stream.

    `messages` and `tools` are what `prompt_ids` render, for a model that reads text.
    """

    key: str
    sample: int
    prompt_ids: TokenIds
    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", token_ids(self.prompt_ids))


@dataclass(frozen=True, slots=True, eq=False)
class Completion(ArrayRecord):
    """A generated response. Its arrays are read-only; sequences become arrays.

    `response_ids` includes the stop token. `logprobs` has one number per id, under the distribution that was
    sampled from; empty if the engine returns none. `policy_version` is the number of optimizer updates of the
    weights that generated it. `routes` are the experts that computed the tokens of prompt and response but
    the last, where the engine records them.
    """

    response_ids: TokenIds
    logprobs: LogProbs
    finish: Finish
    policy_version: int = 0
    routes: Routes | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "response_ids", token_ids(self.response_ids))
        object.__setattr__(self, "logprobs", token_logprobs(self.logprobs))


@dataclass(frozen=True, slots=True)
class EngineCapabilities:
    """Properties of an engine that `check` reads before it is started: `capabilities` of its recipe section.

    `returns_logprobs`: required by policy terms. `is_reproducible`: randomness is keyed by seed, prompt and
    sample, so that a resumed run generates the same responses. `needs_replica`: every process needs memory
    for an unsharded replica of the model.
    """

    returns_logprobs: bool
    is_reproducible: bool
    needs_replica: bool


class ReplicaSource(Protocol):
    """A model with which the processes of a run generate themselves."""

    def unsharded(self) -> AbstractContextManager[tuple[nn.Module, Head]]:
        """Yield body and head with the current weights. Collective.

        The body is unsharded on every process, or a `JoinedBody`, whose forward is collective.
        """


class WeightStream(Protocol):
    """A model whose weights are passed on to other programs."""

    def folder_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the forward pass's current weights by the tensor names of a Hugging Face folder.

        Unsharded, one tensor at a time, on the first process only; the others yield nothing. A tied head has
        no tensor of its own. A tensor may be the model's own memory. Collective: every process must exhaust
        the iterator.
        """


class WeightSource(ReplicaSource, WeightStream, Protocol):
    """A model under training, which provides weights for any engine."""


class Decoder(Protocol):
    """The part of a tokenizer that finds stop texts."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of these ids."""


Generate = Callable[[Sequence[GenerationRequest]], list[Completion]]
Deal = Callable[[Sequence[GenerationRequest], Generate], list[Completion]]
"""Shards requests over the processes and gathers their results: `distributed.scatter_gather`."""


@dataclass(frozen=True, slots=True)
class EngineContext:
    """Arguments of every engine: end tokens and tokenizer of its model, device, seed.

    `deal` shards requests over the processes; `run_on_first` runs work on the first one and returns its
    result on all. Both are collective.
    """

    eos_ids: Collection[int]
    tokenizer: Decoder
    device: torch.device
    seed: int
    deal: Deal
    run_on_first: Callable[[Callable[[], Any]], Any]


class PendingRollouts(Protocol):
    """Submitted requests."""

    def wait(self, on_progress: Callable[[int], None]) -> list[Completion]:
        """Return all responses, in the order of the requests, on every process. Collective.

        `on_progress` is called with the number of responses that this process has generated so far.
        """

    def cancel(self) -> None:
        """Abandon responses that are not generated yet."""


class RolloutEngine(Protocol):
    """Generates responses. All processes of a run call its methods with the same arguments."""

    def submit(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> PendingRollouts:
        """Start to generate one response per request. Collective."""

    def sync_weights(self, source: WeightSource, version: int) -> None:
        """Use these weights from now on; `version` counts their optimizer updates. Collective."""

    def close(self) -> None:
        """Release the resources of the engine."""
