"""Requests to a pool of inference servers: bounded, balanced, retried; in an event loop of its own."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
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
_MAX_RETRY_AFTER_S = 120.0
# Servers close connections that are idle for 5 seconds, without regard to a request on its way.
_KEEP_ALIVE_S = 2.0
_CLOSE_S = 5.0
# Statuses of servers that are overloaded, restarting, or that failed at one request.
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_BUSY = frozenset({425, 429})
_SHOWN = 300  # characters of a server's error


class BadReply(Exception):  # noqa: N818 (handled by the pool)
    """A reply without the fields or numbers that its request asks for; the request may be repeated."""


class WrongWeights(BadReply):
    """A reply from other weights than those that were loaded last, as after a restart of the server."""


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

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Cancel what runs, run `last`, and stop the loop and its thread."""

        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=_CLOSE_S)
            with suppress(TimeoutError):
                await asyncio.wait_for(last(), _CLOSE_S)

        if self._thread.is_alive():
            self.run(end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


@dataclass(eq=False)
class Server:
    """One server of a pool.

    `is_ready` is False until its weights are those of the other servers; `facts` is what the engine's
    protocol has read of it. `problem` is why it was lost last. Replies to requests that began before
    `num_failed_loads` rose come from weights that nobody knows.
    """

    url: str
    facts: Any = None
    is_ready: bool = True
    num_running: int = 0
    down_until: float = 0.0
    num_lost: int = 0
    num_failed_loads: int = 0
    problem: str = ""


OnReturn = Callable[[Server], Awaitable[None]]


@dataclass(eq=False)
class ServerPool:
    """Sends requests to the server with the fewest running ones.

    At most `max_running` requests run at each server. A request is repeated, at another server if there is
    one, when the connection fails, a reply is incomplete, or the status says that the server is at fault; at
    most one of its replies is used. A server that cannot be reached, or is not healthy after a failure (a GET
    of `health`; None: not asked), gets no requests until it is healthy again, and `on_return` has prepared
    it. A key in `headers` is removed from errors; `trust_env` uses the proxies of the environment. Raises
    ServingError when a request has failed `max_attempts` times, or no server has been reachable for `lost_s`
    seconds. A server that is busy (status 429) is asked again for `timeout_s`.
    """

    urls: Sequence[str]
    max_running: int = 256
    timeout_s: float = 600.0
    lost_s: float = 60.0
    max_attempts: int = 5
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    health: str | None = "/health"
    trust_env: bool = False
    on_return: OnReturn | None = None
    num_retries: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.servers = [Server(url.rstrip("/")) for url in self.urls]
        self._loop = EventLoop()
        self._client: httpx2.AsyncClient | None = None
        self._waiting: deque[asyncio.Future[None]] = deque()  # for a server with room
        self._returning: dict[Server, asyncio.Task[None]] = {}

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine in the pool's event loop."""
        return self._loop.submit(work)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the pool's event loop to its end."""
        return self._loop.run(work)

    @contextmanager
    def inside(self, context: AbstractAsyncContextManager[T]) -> Iterator[T]:
        """Enter and leave an asynchronous context in the pool's event loop, from another thread."""

        async def leave(error: BaseException | None) -> bool | None:
            trace = None if error is None else error.__traceback__
            return await context.__aexit__(None if error is None else type(error), error, trace)

        value = self.run(context.__aenter__())
        try:
            yield value
        except BaseException as error:
            if not self.run(leave(error)):
                raise
        else:
            self.run(leave(None))

    def close(self) -> None:
        """Cancel running requests and close all connections."""

        async def close_client() -> None:
            if self._client is not None:
                await self._client.aclose()

        self._loop.close(close_client)

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
            return parsed(parse, await self.call(server, path, body))

        return await self.balanced(path, attempt)

    async def balanced(self, path: str, attempt: Callable[[Server], Awaitable[T]]) -> T:
        """Run `attempt` with a server until it succeeds; see the class. `path` names it in errors."""
        import httpx2

        num_failed, begun, avoided = 0, time.monotonic(), None
        while True:
            server = avoided = await self._acquire(avoided)
            try:
                return await attempt(server)
            except Refused as error:
                raise ServingError(f"{server.url}{path}: {error}") from error
            except (BadReply, httpx2.HTTPError) as error:
                cause: Exception = error
            finally:
                self._release(server)
            self.num_retries += 1
            await self._examine(server, cause)
            if not _is_busy(cause) or time.monotonic() - begun > self.timeout_s:
                num_failed += 1
            if num_failed >= self.max_attempts:
                raise ServingError(
                    f"{server.url}{path}: failed {num_failed} times, at last: {described(cause)}; "
                    "look at the server's log"
                ) from cause
            delay = min(_MAX_BACKOFF_S, _BACKOFF_S * 2 ** max(num_failed, 1))
            await asyncio.sleep(_retry_after(cause) or delay * random.uniform(0.5, 1.0))

    async def _examine(self, server: Server, cause: Exception) -> None:
        """Lose a server that a failed request has shown to be away, or that is not healthy after it."""
        import httpx2

        is_slow = isinstance(cause, httpx2.ReadTimeout)
        if isinstance(cause, WrongWeights) or (isinstance(cause, httpx2.TransportError) and not is_slow):
            self.lose(server, cause)
        elif self.health and server.is_ready and not _is_busy(cause) and not isinstance(cause, BadReply):
            try:
                await self._exchange(server, self.health, None, _CONNECT_S)
            except (httpx2.HTTPError, Refused) as error:
                self.lose(server, error)

    async def _exchange(self, server: Server, path: str, body: object, timeout_s: float) -> httpx2.Response:
        import httpx2

        if self._client is None:
            limits = httpx2.Limits(keepalive_expiry=_KEEP_ALIVE_S)
            # Proxies of the environment are for other hosts: inference servers are on the local network.
            self._client = httpx2.AsyncClient(
                headers=self.headers, limits=limits, trust_env=self.trust_env, follow_redirects=False
            )
        timeout = httpx2.Timeout(timeout_s, connect=_CONNECT_S)
        url = server.url + path
        reply = await (
            self._client.get(url, timeout=timeout)
            if body is None
            else self._client.post(url, json=body, timeout=timeout)
        )
        if reply.status_code in _RETRIED:
            raise httpx2.HTTPStatusError(
                f"status {reply.status_code}: {self._shown(reply)}", request=reply.request, response=reply
            )
        if reply.status_code >= 300:
            raise Refused(reply.status_code, self._shown(reply))
        return reply

    def _shown(self, reply: httpx2.Response) -> str:
        text, key = reply.text, self.headers.get("Authorization", "").removeprefix("Bearer ")
        return (text.replace(key, "[key]") if key else text)[:_SHOWN]

    async def _acquire(self, avoided: Server | None) -> Server:
        """Wait for a reachable server with room; return the one with the fewest running requests.

        `avoided` is returned only if no other is reachable.
        """
        started = time.monotonic()
        while True:
            self._recover()
            now = time.monotonic()
            up = [s for s in self.servers if s.is_ready and s.down_until <= now]
            others = [s for s in up if s is not avoided] or up
            free = [s for s in others if s.num_running < self.max_running]
            if free:
                chosen = min(free, key=lambda s: s.num_running)
                chosen.num_running += 1
                return chosen
            if up:
                started = now
            elif now - started > self.lost_s:
                lost = ", ".join(f"{server.url} ({server.problem})" for server in self.servers)
                raise ServingError(
                    f"{lost}: not available for {self.lost_s:.0f} seconds; start the server again, then run "
                    "the same command to resume"
                )
            freed = asyncio.get_running_loop().create_future()
            self._waiting.append(freed)
            try:
                await asyncio.wait_for(freed, timeout=_DOWN_S / 4)
            except TimeoutError:
                with suppress(ValueError):  # `_release` may have seen that it is cancelled
                    self._waiting.remove(freed)

    def _release(self, server: Server) -> None:
        server.num_running -= 1
        while self._waiting:
            freed = self._waiting.popleft()
            if not freed.done():
                freed.set_result(None)
                return

    def lose(self, server: Server, cause: Exception) -> None:
        """Send no requests to a server until it is healthy and `on_return` has prepared it."""
        server.num_lost += server.is_ready
        server.problem = described(cause)
        server.is_ready, server.down_until = False, time.monotonic() + _DOWN_S

    def _recover(self) -> None:
        """Start to ask servers that were lost for their health."""
        now = time.monotonic()
        for server in self.servers:
            if not server.is_ready and server.down_until <= now and server not in self._returning:
                self._returning[server] = asyncio.create_task(self._return(server))

    async def _return(self, server: Server) -> None:
        try:
            if self.health is not None:
                await self._exchange(server, self.health, None, _CONNECT_S)
            if self.on_return is not None:
                await self.on_return(server)
            server.is_ready = True
        except Exception as error:  # noqa: BLE001 (it is asked again, and named when none returns in time)
            server.problem, server.down_until = described(error), time.monotonic() + _DOWN_S
        finally:
            del self._returning[server]


def parsed(parse: Callable[[Any], T], reply: Any) -> T:
    """Return what `parse` makes of a reply. Raises BadReply also for fields of other types than expected."""
    try:
        return parse(reply)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise BadReply(f"the reply has another form than expected ({error!r})") from error


def is_transient(error: Exception) -> bool:
    """Whether a ServingError comes from a lost connection or a server's failure, not from a refusal."""
    import httpx2

    return isinstance(error.__cause__, httpx2.HTTPError | BadReply)


def _is_busy(cause: Exception) -> bool:
    return _status(cause) in _BUSY


def _status(cause: Exception) -> int | None:
    return getattr(getattr(cause, "response", None), "status_code", None)


def _retry_after(cause: Exception) -> float | None:
    """Return the seconds of a reply's `Retry-After`; None without one, or where it is a date."""
    after = "" if _status(cause) is None else cause.response.headers.get("retry-after", "")  # type: ignore[attr-defined]
    return min(float(after), _MAX_RETRY_AFTER_S) if after.replace(".", "", 1).isdecimal() else None


def described(error: Exception) -> str:
    """Describe an error of a request in a few words."""
    return str(error) or type(error).__name__
