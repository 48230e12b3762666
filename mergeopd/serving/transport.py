"""Requests to a pool of inference servers: bounded, balanced, retried; in an event loop of its own."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from mergeopd.errors import ServingError

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")

# A server that refuses or drops connections gets no requests for this long; then it is asked for its health.
_DOWN_S = 2.0
_BACKOFF_S = 0.25
_MAX_BACKOFF_S = 8.0
_CONNECT_S = 5.0
# Statuses of servers that are overloaded, restarting, or that failed at one request.
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_SHOWN = 300  # characters of a server's error


class BadReply(Exception):  # noqa: N818 (handled by the pool)
    """A reply without the fields or numbers that its request asks for; the request may be repeated."""


class Refused(Exception):  # noqa: N818 (handled by callers)
    """A server rejects a request (status 4xx), which another attempt would not change."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"status {status}: {text}")
        self.status = status


class EventLoop:
    """An event loop in a daemon thread, in which requests progress while the caller computes."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mergeopd-http", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine; cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end."""
        return self.submit(work).result()

    def close(self) -> None:
        """Cancel what runs, and stop the loop and its thread."""
        if self._thread.is_alive():
            self.run(_cancel_all())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


@dataclass(eq=False)
class Server:
    """One server of a pool. `is_ready` is False until its weights are those of the other servers."""

    url: str
    is_ready: bool = True
    num_running: int = 0
    down_until: float = 0.0
    num_lost: int = 0


OnReturn = Callable[[Server], Awaitable[None]]


@dataclass(eq=False)
class ServerPool:
    """Sends requests to the server with the fewest running ones.

    At most `max_running` requests run at each server. A request is repeated, at any server, when the
    connection fails, a reply is incomplete, or the status says that the server is at fault; at most one of
    its replies is used. A server that cannot be reached gets no requests until it is healthy again, and
    `on_return` has prepared it. Raises ServingError when a request has failed `max_attempts` times, or no
    server has been reachable for `lost_s` seconds.
    """

    urls: Sequence[str]
    max_running: int = 256
    timeout_s: float = 600.0
    lost_s: float = 60.0
    max_attempts: int = 5
    headers: Mapping[str, str] = field(default_factory=dict)
    on_return: OnReturn | None = None
    num_retries: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.servers = [Server(url.rstrip("/")) for url in self.urls]
        self._loop = EventLoop()
        self._client: httpx2.AsyncClient | None = None
        self._freed: asyncio.Condition | None = None
        self._returning: dict[Server, asyncio.Task[None]] = {}

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine in the pool's event loop."""
        return self._loop.submit(work)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the pool's event loop to its end."""
        return self._loop.run(work)

    def close(self) -> None:
        """Close all connections; running requests are cancelled."""
        if self._client is not None:
            self._loop.run(_cancel_all())
            self._loop.run(self._client.aclose())
            self._client = None
        self._loop.close()

    async def call(
        self, server: Server, path: str, body: object = None, *, timeout_s: float | None = None
    ) -> Any:
        """Send one request to one server, once: GET without a body, else POST; return the JSON of its reply.

        An empty reply is None. Raises httpx2.TransportError, BadReply, Refused.
        """
        content = await self.content(server, path, body, timeout_s=timeout_s)
        if not content:
            return None
        try:
            return json.loads(content)
        except ValueError as error:
            raise BadReply(f"the reply is not JSON ({len(content)} bytes)") from error

    async def content(
        self, server: Server, path: str, body: object = None, *, timeout_s: float | None = None
    ) -> bytes:
        """Send one request as `call` does; return the bytes of its reply."""
        return bytes((await self._exchange(server, path, body, timeout_s or self.timeout_s)).content)

    async def request(self, path: str, body: object, parse: Callable[[Any], T]) -> T:
        """Send a request that may be repeated; return what `parse` makes of its reply.

        `parse` raises BadReply for a reply that cannot be used. Raises ServingError.
        """

        async def attempt(server: Server) -> T:
            return parse(await self.call(server, path, body))

        return await self.balanced(path, attempt)

    async def balanced(self, path: str, attempt: Callable[[Server], Awaitable[T]]) -> T:
        """Run `attempt` with a server until it succeeds; see the class. `path` names it in errors."""
        import httpx2

        num_failed = 0
        while True:
            server = await self._acquire()
            try:
                return await attempt(server)
            except Refused as error:
                raise ServingError(f"{server.url}{path}: {error}") from error
            except httpx2.TransportError as error:
                cause: Exception = error
                if not isinstance(error, httpx2.ReadTimeout):
                    self._lose(server)
            except (BadReply, httpx2.HTTPStatusError) as error:
                cause = error
            finally:
                await self._release(server)
            num_failed += 1
            self.num_retries += 1
            if num_failed >= self.max_attempts:
                raise ServingError(
                    f"{server.url}{path}: failed {num_failed} times, at last: {described(cause)}; "
                    "look at the server's log"
                ) from cause
            delay = min(_MAX_BACKOFF_S, _BACKOFF_S * 2**num_failed)
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))

    async def _exchange(self, server: Server, path: str, body: object, timeout_s: float) -> httpx2.Response:
        import httpx2

        if self._client is None:
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
            # Proxies of the environment are for other hosts: inference servers are on the local network.
            self._client = httpx2.AsyncClient(headers=self.headers, limits=limits, trust_env=False)
        timeout = httpx2.Timeout(timeout_s, connect=_CONNECT_S)
        url = server.url + path
        reply = await (
            self._client.get(url, timeout=timeout)
            if body is None
            else self._client.post(url, json=body, timeout=timeout)
        )
        if reply.status_code in _RETRIED:
            raise httpx2.HTTPStatusError(
                f"status {reply.status_code}: {reply.text[:_SHOWN]}", request=reply.request, response=reply
            )
        if reply.status_code >= 300:
            raise Refused(reply.status_code, reply.text[:_SHOWN])
        return reply

    async def _acquire(self) -> Server:
        """Wait for a reachable server with room; return the one with the fewest running requests."""
        if self._freed is None:
            self._freed = asyncio.Condition()
        started = time.monotonic()
        while True:
            self._recover()
            now = time.monotonic()
            up = [s for s in self.servers if s.is_ready and s.down_until <= now]
            free = [s for s in up if s.num_running < self.max_running]
            if free:
                chosen = min(free, key=lambda s: s.num_running)
                chosen.num_running += 1
                return chosen
            if up:
                started = now
            elif now - started > self.lost_s:
                urls = ", ".join(server.url for server in self.servers)
                raise ServingError(
                    f"{urls}: not reachable for {self.lost_s:.0f} seconds; start the server again, then run "
                    "the same command to resume"
                )
            async with self._freed:
                try:
                    await asyncio.wait_for(self._freed.wait(), timeout=0.5)
                except TimeoutError:
                    continue

    async def _release(self, server: Server) -> None:
        server.num_running -= 1
        assert self._freed is not None
        async with self._freed:
            self._freed.notify()

    def _lose(self, server: Server) -> None:
        server.num_lost += 1
        server.is_ready, server.down_until = False, time.monotonic() + _DOWN_S

    def _recover(self) -> None:
        """Start to ask servers that were lost for their health."""
        now = time.monotonic()
        for server in self.servers:
            if not server.is_ready and server.down_until <= now and server not in self._returning:
                self._returning[server] = asyncio.create_task(self._return(server))

    async def _return(self, server: Server) -> None:
        import httpx2

        try:
            await self._exchange(server, "/health", None, _CONNECT_S)
            if self.on_return is not None:
                await self.on_return(server)
            server.is_ready = True
        except (httpx2.HTTPError, Refused, BadReply, ServingError):
            server.down_until = time.monotonic() + _DOWN_S
        finally:
            del self._returning[server]


async def _cancel_all() -> None:
    """Cancel all other tasks of the running loop, and wait for their ends."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def described(error: Exception) -> str:
    """Describe an error of a request in a few words."""
    return str(error) or type(error).__name__
