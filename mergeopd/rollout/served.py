"""Generate with inference servers, which get the student's weights through a folder or from memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from mergeopd.errors import ServingError
from mergeopd.rollout.protocol import Completion, EngineContext, GenerationRequest, WeightSource
from mergeopd.rollout.servers import Servers
from mergeopd.rollout.transfer import TransferSync
from mergeopd.serving.protocol import Generated, InferenceApi, ServerFacts
from mergeopd.serving.transport import BadReply, Server, ServerPool, WrongWeights, is_transient, parsed
from mergeopd.types import Sampling

T = TypeVar("T")

_log = logging.getLogger(__name__)
# Interval at which progress is reported, and servers that were started are watched.
_POLL_S = 0.2


class Publisher(Protocol):
    """Passes weights on to servers through folders."""

    def publish(self, source: WeightSource, version: int) -> Path:
        """Write a version of the weights as a folder that servers can load, and return it. Collective."""

    def discard(self) -> None:
        """Remove all versions. On the first process only."""


Begin = Callable[[int], Callable[[int], None]]
"""Reports that a number of servers starts; returns a callback for how many are ready, which may raise."""


@dataclass(frozen=True, slots=True)
class ServingCounts:
    """Counts since the start: requests that were repeated, responses of wrong weights, servers lost."""

    num_retries: int = 0
    num_stale: int = 0
    num_lost: int = 0


class _WeightsWanted(Exception):  # noqa: N818 (handled here)
    """Responses that are waited for need servers that have lost their weights."""


@dataclass
class _Connection:
    """The servers as the first process sees them."""

    pool: ServerPool
    folder: Path | None = None
    version: int | None = None
    num_stale: int = 0
    banned: range = range(0)
    running: set[Future[list[Completion]]] = field(default_factory=set)  # of calls of `submit`


@dataclass
class ServedEngine:
    """Sends requests to servers from the first process; the others get the responses.

    `padding` are the rows of the model's head behind its vocabulary, which hardly have any probability in
    trained models: they are banned as soon as one of them is sampled. `concurrency` requests run at each
    server. After `lost_s` seconds without any server, the run stops. `check_stop` may raise while weights are
    loaded, to stop the run.
    """

    api: InferenceApi
    servers: Servers
    context: EngineContext
    publisher: Publisher | TransferSync
    padding: range
    concurrency: int
    timeout_s: float
    lost_s: float = 60.0
    headers: Mapping[str, str] = field(default_factory=dict)
    begin: Begin = lambda num: lambda num_ready: None
    check_stop: Callable[[], None] = lambda: None
    _connection: _Connection | None = field(default=None, init=False)

    def submit(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> ServedRollouts:
        """Start to generate; responses arrive while the caller computes. Collective."""
        begun = self.context.run_on_first
        started: list[_Running] = []
        begun(lambda: started.append(self._start(requests, sampling)))
        return ServedRollouts(self, started[0] if started else None, begun)

    @property
    def background(self) -> ServedEngine:
        """The same engine for other threads of the first process: its methods are not collective."""
        local = replace(self.context, run_on_first=lambda work: work())
        engine = replace(self, context=local)
        engine._connection = self._opened()
        return engine

    def sync_weights(self, source: WeightSource, version: int) -> None:
        """Publish the weights, load them into every server and check that they are there. Collective.

        Running requests continue with the new weights. Raises ServingError.
        """
        if isinstance(self.publisher, TransferSync):
            self.publisher.sync(source, version, self._running_servers)
            if self._connection is not None:
                self._connection.version = version  # not before: some servers have the weights earlier
            return
        folder = self.publisher.publish(source, version)
        self.context.run_on_first(lambda: self._load(folder, version))

    def close(self) -> None:
        """Close the connections, and stop servers that were started for the run."""
        if self._connection is not None:
            self._connection.pool.close()
            self._connection = None
            self.servers.close()
            self.publisher.discard()

    def counts(self) -> ServingCounts:
        """Return the counts of the first process; zeros on others."""
        one = self._connection
        if one is None:
            return ServingCounts()
        num_lost = sum(server.num_lost for server in one.pool.servers)
        return ServingCounts(one.pool.num_retries, one.num_stale, num_lost)

    def compare_servers(self) -> None:
        """Raise ServingError if servers have different weights, where they offer checksums. Collective."""
        self.context.run_on_first(self._compare_checksums)

    def _compare_checksums(self) -> None:
        pool = self._opened().pool
        ready = [server for server in pool.servers if server.is_ready]
        if len(ready) < 2:
            return

        async def all_checksums() -> list[str | None]:
            return list(await asyncio.gather(*(self.api.checksum(pool, server) for server in ready)))

        for server, digest in zip(ready, checksums := pool.run(all_checksums()), strict=True):
            if digest != checksums[0]:
                raise ServingError(
                    f"{server.url} and {ready[0].url} have different weights after one update, by their "
                    "checksums; start both with the same options, or remove one"
                )

    def facts(self) -> list[ServerFacts]:
        """Return the facts of all servers. Raises ServingError for servers that cannot be used."""
        pool = self._opened().pool

        async def all_facts() -> list[ServerFacts]:
            return list(await asyncio.gather(*(self.api.facts(pool, server) for server in pool.servers)))

        return pool.run(all_facts())

    def _opened(self) -> _Connection:
        """Start the servers if that is due, and connect to them."""
        if self._connection is None:
            urls = self.servers.start(self.begin(self.servers.num_to_start))
            pool = ServerPool(
                urls,
                max_running=self.concurrency,
                timeout_s=self.timeout_s,
                lost_s=self.lost_s,
                headers=self.headers,
            )
            self._connection = _Connection(pool)
            pool.on_return = self._prepare
            try:
                self.facts()
            except ServingError as error:
                if not is_transient(error):
                    raise
                again = "start the server, then run the same command to resume"
                raise ServingError(f"{error}; {again}") from error
        return self._connection

    def repeat_transfer(self) -> None:
        """Send the weights of the last sync again, to servers that were started again. Collective."""
        assert isinstance(self.publisher, TransferSync)
        self.publisher.repeat(self._running_servers)

    def _running_servers(self) -> ServerPool:
        """Return the servers, after a restart of those that have crashed."""
        pool = self._opened().pool
        self.servers.check(self.check_stop)
        return pool

    def _load(self, folder: Path, version: int) -> None:
        one = self._opened()
        one.folder, one.version = folder, version
        pool = one.pool

        async def load(server: Server) -> Exception | None:
            running = bool(one.running)
            try:
                await self.api.load_weights(
                    pool, server, folder.resolve(), str(version), keep_running=running
                )
            except ServingError as error:
                _log.warning("%s", error)
                server.num_failed_loads += 1
                pool.lose(server, error)
                return error
            return None

        async def load_all() -> list[Exception | None]:
            return await asyncio.gather(*(load(server) for server in pool.servers if server.is_ready))

        errors = self._wait(pool.submit(load_all()), self.check_stop)
        # Servers that are away or were restarted get the weights when they return.
        if errors and all(error is not None and not is_transient(error) for error in errors):
            assert errors[0] is not None
            raise errors[0]

    async def _prepare(self, server: Server) -> None:
        """Give a server that has returned the current weights."""
        one, loaded = self._connection, None
        while one is not None and one.folder is not None and loaded != one.version:
            folder, loaded = one.folder, one.version
            await self.api.facts(one.pool, server)  # it may have been started in another way
            await self.api.load_weights(one.pool, server, folder.resolve(), str(loaded), keep_running=False)
        if one is not None and isinstance(self.publisher, TransferSync):
            await self.api.facts(one.pool, server)
            await self.publisher.check(one.pool, server)

    def _wait(self, work: Future[T], while_waiting: Callable[[], None]) -> T:
        """Return the result of work in the pool's loop; if `while_waiting` raises, the work is cancelled.

        It continues after `_WeightsWanted`.
        """
        try:
            while True:
                try:
                    return work.result(_POLL_S)
                except TimeoutError:
                    if work.done():
                        raise
                while_waiting()
        except _WeightsWanted:
            raise
        except BaseException:
            work.cancel()
            raise

    def _start(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> _Running:
        one = self._opened()
        if one.version is None:
            raise ValueError("sync_weights must be called before submit")
        running = _Running(self, one, one.version, requests, sampling)
        running.future = one.pool.submit(running.generate())
        one.running.add(running.future)
        running.future.add_done_callback(one.running.discard)
        return running


@dataclass
class _Running:
    """Requests in progress, on the first process."""

    engine: ServedEngine
    connection: _Connection
    version: int
    requests: Sequence[GenerationRequest]
    sampling: Sampling
    num_done: int = 0
    future: Future[list[Completion]] = field(init=False)

    async def generate(self) -> list[Completion]:
        """Return a response per request, in order."""
        completions: list[Completion | None] = [None] * len(self.requests)
        positions = iter(range(len(self.requests)))

        async def work() -> None:
            for position in positions:
                completions[position] = await self._one(self.requests[position])
                self.num_done += 1

        pool = self.connection.pool
        try:
            num_workers = min(len(self.requests), pool.max_running * len(pool.servers))
            async with asyncio.TaskGroup() as group:
                for _ in range(num_workers):
                    group.create_task(work())
        except* ServingError as errors:
            raise errors.exceptions[0] from None
        return [completion for completion in completions if completion is not None]

    @property
    def _newest(self) -> int:
        """The version that was loaded last: running requests may have got it."""
        publisher, version = self.engine.publisher, self.connection.version
        if isinstance(publisher, TransferSync):
            version = publisher.version  # some servers have it before all have it
        return self.version if version is None else version

    async def _one(self, request: GenerationRequest) -> Completion:
        engine, pool = self.engine, self.connection.pool
        eos_ids = engine.context.eos_ids
        # JSON takes integers of Python only.
        prompt_ids = request.prompt_ids.tolist()

        async def attempt(server: Server) -> Completion:
            banned = self.connection.banned
            path, body = engine.api.generation(prompt_ids, self.sampling, eos_ids, banned)
            num_failed_loads = server.num_failed_loads
            reply = await pool.call(server, path, body)
            read = partial(engine.api.generated, sampling=self.sampling, eos_ids=eos_ids)
            generated = parsed(read, reply)
            if server.num_failed_loads > num_failed_loads:
                raise BadReply("weights were loaded in part while the response was generated")
            return self._checked(generated)

        return await pool.balanced("", attempt)

    def _checked(self, generated: Generated) -> Completion:
        """Convert a response.

        Raises BadReply for one that cannot be of this request and these weights, ServingError for one that
        every attempt would cut.
        """
        ids = generated.ids
        if len(ids) > self.sampling.max_new_tokens:
            raise BadReply(f"{len(ids)} tokens, more than {self.sampling.max_new_tokens}")
        if generated.finish == "length" and len(ids) < self.sampling.max_new_tokens:
            raise ServingError(
                f"a server cut a response after {len(ids)} tokens: its context is shorter than prompt and "
                f"max_new_tokens ({self.sampling.max_new_tokens}); start it with a longer context, or lower "
                "`rollout.max_new_tokens`"
            )
        if max(ids) >= self.engine.padding.start:
            self.connection.banned = self.engine.padding
            raise BadReply(f"id {max(ids)} is no token: the vocabulary ends at {self.engine.padding.start}")
        version = self.version
        if generated.versions:
            known = {str(number): number for number in range(self.version, self._newest + 1)}
            strange = [version for version in generated.versions if version not in known]
            if strange:
                self.connection.num_stale += 1
                raise WrongWeights(
                    f"a response of weights {strange[0]!r}, where {self.version} were loaded; does another "
                    "run use the server?"
                )
            version = min(known[version] for version in generated.versions)
        logprobs = np.array(generated.logprobs, np.float32)
        return Completion(np.array(ids, np.int32), logprobs, generated.finish, version)


@dataclass(frozen=True)
class ServedRollouts:
    """Submitted requests; `running` is None on other processes than the first."""

    engine: ServedEngine
    running: _Running | None
    run_on_first: Callable[[Callable[[], list[Completion] | None]], list[Completion] | None]

    def wait(self, on_progress: Callable[[int], None]) -> list[Completion]:
        """Return all responses. Collective; `on_progress` may raise, which cancels the requests."""
        while (completions := self.run_on_first(lambda: self._wait(on_progress))) is None:
            self.engine.repeat_transfer()
        return completions

    def cancel(self) -> None:
        """Abandon the requests; servers notice that the connections are closed."""
        if self.running is not None:
            self.running.future.cancel()

    def _wait(self, on_progress: Callable[[int], None]) -> list[Completion] | None:
        """Return all responses, or None when servers must get weights from all processes before."""
        running, publisher = self.running, self.engine.publisher
        assert running is not None

        def check() -> None:
            on_progress(running.num_done)
            self.engine.servers.check(lambda: on_progress(running.num_done))
            if isinstance(publisher, TransferSync) and publisher.is_wanted(running.connection.pool):
                raise _WeightsWanted

        try:
            return self.engine._wait(running.future, check)
        except _WeightsWanted:
            return None
