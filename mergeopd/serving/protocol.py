"""The wire protocol of an inference engine, as the clients of this package use it."""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from mergeopd.errors import ServingError
from mergeopd.serving.transport import BadReply, Refused, Server, ServerPool, described
from mergeopd.types import Finish, Sampling

Transfer = Literal["nccl", "gloo", "ipc"]
"""Ways of weights from memory to memory: a process group over NCCL or Gloo, or shared memory of one GPU."""


@dataclass(frozen=True, slots=True)
class Generated:
    """A response: token ids with the stop token, and the log-probability of each under the distribution that
    was sampled from, in nats. `versions` are the weight versions that generated it, oldest first; empty where
    the server does not tell.
    """

    ids: list[int]
    logprobs: list[float]
    finish: Finish
    versions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server says of itself.

    `max_tokens` is the longest sequence (prompt and response); `num_workers` processes hold parts of the
    model.
    """

    version: str
    routes: frozenset[str]
    max_tokens: int | None = None
    model: str | None = None
    on_cpu: bool = False
    num_workers: int = 1


class InferenceApi(Protocol):
    """Requests and replies of one engine. Bodies are JSON values; every sampling field is sent."""

    async def facts(self, pool: ServerPool, server: Server) -> ServerFacts:
        """Return the facts of a server. Raises ServingError below the oldest supported version."""

    def generation(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        eos_ids: Collection[int],
        banned: Collection[int],
    ) -> tuple[str, dict[str, Any]]:
        """Return path and body of a request for one response.

        Only `eos_ids` and stop texts end it; `banned` ids have no probability.
        """

    def generated(self, reply: Any, sampling: Sampling, eos_ids: Collection[int]) -> Generated:
        """Read the reply. Raises BadReply, and ServingError for a server that cannot do what was asked."""

    def scoring(self, ids: Sequence[int], start: int) -> tuple[str, dict[str, Any]]:
        """Return path and body of a request for the log-probabilities of `ids[start:]` at temperature 1."""

    def scored(self, reply: Any, ids: Sequence[int], start: int) -> list[float]:
        """Read the log-probabilities, in nats. Raises BadReply."""

    def updating(
        self, pool: ServerPool, server: Server, version: str, *, keep_running: bool
    ) -> AbstractAsyncContextManager[None]:
        """Surround an update of the weights.

        Then all cached states of other weights are dropped. `keep_running`: nothing is generated meanwhile,
        and running requests resume with the new weights; otherwise they are finished first. Raises
        ServingError when the server does not confirm the version.
        """

    async def checksum(self, pool: ServerPool, server: Server) -> str | None:
        """Return a digest of the weights; None where the server offers none. Raises ServingError."""

    async def load_weights(
        self, pool: ServerPool, server: Server, folder: Path, version: str, *, keep_running: bool
    ) -> None:
        """Load the weights of a folder; see `updating`."""

    async def weight_version(self, pool: ServerPool, server: Server) -> str | None:
        """Return the version of a server's weights, None where it tells none. Raises ServingError."""


def check_weight_version(server: Server, told: str | None, version: str) -> None:
    """Raise ServingError if a server has another version of the weights than it was given."""
    if told != version:
        raise ServingError(
            f"{server.url}: has weights of version {told!r} after an update to {version!r}; restart the "
            "server, then run the same command to resume"
        )


# Added to the logits of banned ids: exp(-100) is lost beside any other probability.
BANNED = -100.0


def check_version(server: Server, engine: str, version: str, oldest: tuple[int, ...]) -> None:
    """Raise ServingError if a server's version is below the oldest supported one, or cannot be read."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[: len(oldest)])
    needed = ".".join(map(str, oldest))
    if len(numbers) < len(oldest):
        raise ServingError(
            f"{server.url}: the server does not tell a version of {engine}; start {engine} {needed} or newer "
            "there, or name its `engine`"
        )
    if numbers < oldest:
        raise ServingError(
            f"{server.url}: {engine} {version} is too old; update the server to {needed} or newer"
        )


@contextmanager
def replies_of(server: Server, engine: str) -> Iterator[None]:
    """Raise ServingError for replies that an engine would not send."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ServingError(
            f"{server.url}: does not reply as {engine} does ({error!r}); correct the address"
        ) from error


def logprob_of(value: Any) -> float:
    """Return a log-probability of a reply. Raises BadReply unless it is a finite number of at most 0."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise BadReply(f"a log-probability is {value!r}")
    if value > 1e-3:
        raise BadReply(f"a log-probability is {value!r}, more than 0")
    return float(value)


def ids_of(value: Any) -> list[int]:
    """Return the token ids of a reply. Raises BadReply unless it is a list of integers that is not empty."""
    if not isinstance(value, list) or not value or not all(type(i) is int and i >= 0 for i in value):
        raise BadReply("the token ids are missing")
    return value


@asynccontextmanager
async def restored(restore: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Run `restore` at the end; the error of failed work is raised rather than that of `restore`."""
    try:
        yield
    except BaseException:
        with suppress(ServingError):
            await restore()
        raise
    await restore()


async def command(
    pool: ServerPool, server: Server, path: str, body: object, *, timeout_s: float | None = None
) -> Any:
    """Send a request that changes a server, once. Raises ServingError when it fails."""
    import httpx2

    try:
        return await pool.call(server, path, body, timeout_s=timeout_s)
    except (httpx2.HTTPError, BadReply, Refused) as error:
        raise ServingError(f"{server.url}{path}: {described(error)}") from error
