"""Send weights to inference servers from memory, without a folder that both sides can read."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import distributed_c10d as c10d

from mergeopd.errors import ServingError
from mergeopd.rollout.protocol import WeightStream
from mergeopd.serving.protocol import InferenceApi, command
from mergeopd.serving.sglang import confirmed
from mergeopd.serving.transport import Server, ServerPool

_log = logging.getLogger(__name__)

T = TypeVar("T")
Tensors = Iterator[tuple[str, Tensor]]
# A request and the thread beside it fail together; the request's error tells more.
_SAME_FAILURE_S = 2.0
# Interval at which servers are asked whether one is back.
_ASK_S = 1.0


class WeightTransfer(ABC):
    """Sends weights to servers that are paused; all but `learn` on the first process only."""

    def learn(self, source: WeightStream) -> None:  # noqa: B027 (most need nothing)
        """Read what must be known of the weights before they are sent. Collective."""

    @abstractmethod
    def send(self, pool: ServerPool, server: Server, tensors: Tensors, version: str) -> None:
        """Send all tensors to a server; the first time, connect to it.

        Raises ServingError; the server may have a part of the new weights then.
        """

    @abstractmethod
    def forget(self, server: Server) -> None:
        """Drop the connection to a server that failed or was started again."""


@dataclass
class TransferSync:
    """Gives servers the student's weights from memory, one after another, so that the others work meanwhile.

    A server that is started again, or to which a transfer broke off, gets weights at the next sync, and no
    requests before. `is_current`: the weights are still those of the last sync whenever responses are waited
    for, so that they can be sent again when no other server is left.
    """

    api: InferenceApi
    transfer: WeightTransfer
    run_on_first: Callable[[Callable[[], Any]], Any]
    is_current: bool = False
    _source: WeightStream | None = field(default=None, init=False)
    version: int | None = field(default=None, init=False)
    """that servers have, or are getting"""
    _unknown: set[Server] = field(default_factory=set, init=False)
    """servers that may have parts of several versions"""
    _connected: set[Server] = field(default_factory=set, init=False)
    _waiting: set[Server] = field(default_factory=set, init=False)
    """servers that have returned without the current weights"""

    def sync(self, source: WeightStream, version: int, pool: Callable[[], ServerPool]) -> None:
        """Send the weights to all servers that can be reached. Collective.

        `pool` is called on the first process, which raises ServingError if no server has the weights then.
        """
        servers: list[Server] = []  # on the first process only
        errors: list[ServingError] = []

        def find() -> int:
            end = time.monotonic() + pool().lost_s
            servers.extend(self._reachable(pool()))
            while not servers and time.monotonic() < end:
                time.sleep(_ASK_S)
                servers.extend(self._reachable(pool()))
            return len(servers)

        num_servers: int = self.run_on_first(find)
        self._source, self.version = source, version
        self.transfer.learn(source)
        for index in range(num_servers):
            tensors = source.folder_weights()
            if servers:
                errors += self._send(pool(), servers[index], tensors)
            deque(tensors, maxlen=0)  # the other processes only take part
        self.run_on_first(lambda: self._check_one_is_ready(pool(), errors))

    def is_wanted(self, pool: ServerPool) -> bool:
        """Whether `repeat` would help: no server has the weights, and one waits. First process only."""
        return self.is_current and bool(self._waiting) and not any(one.is_ready for one in pool.servers)

    def repeat(self, pool: Callable[[], ServerPool]) -> None:
        """Send the weights of the last sync again. Collective; see `sync`."""
        assert self._source is not None
        assert self.version is not None
        self.sync(self._source, self.version, pool)

    async def check(self, pool: ServerPool, server: Server) -> None:
        """Raise ServingError unless a server that was lost has the current weights."""
        told = await self.api.weight_version(pool, server)
        if server in self._unknown or told != str(self.version):
            self._waiting.add(server)
            raise ServingError(
                f"{server.url}: was started again, or got a part of its weights only; it gets weights at the "
                "next sync"
            )

    def discard(self) -> None:
        """Drop all connections. On the first process only."""
        for server in self._connected:
            self.transfer.forget(server)

    def _reachable(self, pool: ServerPool) -> list[Server]:
        async def ask(server: Server) -> Server | None:
            try:
                told = None if server.facts is None else await self.api.weight_version(pool, server)
                is_same = server.facts is not None and told in (None, str(self.version))
                if not (is_same and server.is_ready):
                    self.transfer.forget(server)  # it has been started again since
                    await self.api.facts(pool, server)
            except ServingError as error:
                self._lose(pool, server, error)
                return None
            return server

        async def ask_all() -> list[Server | None]:
            return list(await asyncio.gather(*map(ask, pool.servers)))

        return [server for server in pool.run(ask_all()) if server is not None]

    def _send(self, pool: ServerPool, server: Server, tensors: Tensors) -> list[ServingError]:
        version = str(self.version)
        self._connected.add(server)
        try:
            # A transfer takes several requests, between which nothing may be generated.
            with pool.inside(self.api.updating(pool, server, version, keep_running=True)):
                try:
                    self.transfer.send(pool, server, tensors, version)
                except ServingError:
                    self._distrust(server)  # before its requests continue
                    raise
        except ServingError as error:
            self._distrust(server)
            self._lose(pool, server, error)
            return [error]
        self._unknown.discard(server)
        self._waiting.discard(server)
        server.is_ready = True
        return []

    def _distrust(self, server: Server) -> None:
        self._unknown.add(server)
        server.num_failed_loads += 1

    def _lose(self, pool: ServerPool, server: Server, error: ServingError) -> None:
        _log.warning("%s", error)
        pool.lose(server, error)
        self.transfer.forget(server)

    def _check_one_is_ready(self, pool: ServerPool, errors: Sequence[ServingError]) -> None:
        if not any(server.is_ready for server in pool.servers):
            urls = ", ".join(server.url for server in pool.servers)
            raise ServingError(
                f"{errors[0] if errors else f'{urls}: not reachable'}\nNo server has the weights of version "
                f"{self.version}: start the servers again, then run the same command to resume"
            )


@dataclass
class _Group:
    """A torch process group of this process (rank 0) and the workers of one server."""

    name: str
    group: dist.ProcessGroup


@dataclass
class GroupTransfer(WeightTransfer):
    """Broadcasts weights to SGLang, in a torch process group with each server.

    `device` is that of the tensors while they are sent. Tested with gloo against a real server on a CPU; with
    nccl it has not been run. Source: `WeightUpdater` in SGLang's `srt/model_executor`, 0.5.23.
    """

    backend: Literal["nccl", "gloo"]
    device: torch.device
    bucket_bytes: int = 512 << 20
    """memory for tensors that are sent together, on both sides"""
    _groups: dict[Server, _Group] = field(default_factory=dict, init=False)

    def send(self, pool: ServerPool, server: Server, tensors: Tensors, version: str) -> None:
        group = self._groups.get(server) or self._connect(pool, server)
        has_session = _has_session(server)
        if has_session:
            pool.run(confirmed(pool, server, "/begin_weight_update", {}))
        bucket = _next_bucket(tensors, self.device, self.bucket_bytes)
        while bucket:
            following = _next_bucket(tensors, self.device, self.bucket_bytes)
            body = {
                "names": [name for name, _ in bucket],
                "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                "shapes": [list(tensor.shape) for _, tensor in bucket],
                "group_name": group.name,
                "flush_cache": not following,
                "weight_version": None if following else version,
            }
            request = pool.submit(confirmed(pool, server, "/update_weights_from_distributed", body))
            sending = partial(_broadcast, group.group, [tensor for _, tensor in bucket])
            alongside(request, sending, server, pool.timeout_s, self.device)
            bucket = following
        if has_session:
            pool.run(confirmed(pool, server, "/end_weight_update", {}))

    def forget(self, server: Server) -> None:
        connection = self._groups.pop(server, None)
        if connection is not None:
            # Ends a broadcast that waits for a server.
            with contextlib.suppress(RuntimeError, ValueError, KeyError):
                connection.group.abort()
                dist.destroy_process_group(connection.group)

    def _connect(self, pool: ServerPool, server: Server) -> _Group:
        if _has_session(server):
            # A transfer that broke off leaves its session open.
            with contextlib.suppress(ServingError):
                pool.run(command(pool, server, "/end_weight_update", {}))
        name = f"mergeopd-{secrets.token_hex(4)}"
        size = 1 + server.facts.num_workers
        with listener_towards(server.url) as listener:
            host, port = listener.getsockname()[:2]
            limit = timedelta(seconds=pool.timeout_s)
            # The store takes the descriptor over.
            store = TCPStore(
                host,
                port,
                size,
                is_master=True,
                timeout=limit,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
        body = {"master_address": host, "master_port": port, "rank_offset": 1, "world_size": size}
        body |= {"group_name": name, "backend": self.backend}
        request = pool.submit(confirmed(pool, server, "/init_weights_update_group", body))

        def join() -> dist.ProcessGroup:
            # As SGLang does on its side: a group beside the default one, which there may be none of.
            prefixed = PrefixStore(name, store)
            group: dist.ProcessGroup
            group, _ = c10d._new_process_group_helper(
                size, 0, [], c10d.Backend(self.backend), prefixed, c10d.GroupName(name), timeout=limit
            )
            c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
            return group

        group = alongside(request, join, server, pool.timeout_s, self.device)
        self._groups[server] = _Group(name, group)
        return self._groups[server]


def _has_session(server: Server) -> bool:
    """Return whether a server takes weights within a session only, as newer ones do."""
    return "/begin_weight_update" in server.facts.routes


def _next_bucket(tensors: Tensors, device: torch.device, max_bytes: int) -> list[tuple[str, Tensor]]:
    """Return the next tensors up to a number of bytes, at least one; an empty list after the last."""
    bucket, num_bytes = [], 0
    for name, tensor in tensors:
        bucket.append((name, tensor.detach().to(device).contiguous()))
        num_bytes += tensor.nbytes
        if num_bytes >= max_bytes:
            break
    return bucket


def _broadcast(group: dist.ProcessGroup, tensors: list[Tensor]) -> None:
    pending = [group.broadcast(tensor, 0) for tensor in tensors]
    for one in pending:
        one.wait()
    if tensors[0].is_cuda:
        torch.cuda.synchronize(tensors[0].device)


def alongside(
    request: Future[None] | None,
    work: Callable[[], T],
    server: Server,
    limit_s: float,
    device: torch.device,
) -> T:
    """Do work that blocks in a thread, while a server handles a request for its part; return its result.

    Raises ServingError when either fails, or after `limit_s`; a thread that still blocks is abandoned.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            # Both are settings of a thread.
            with torch.no_grad(), _current(device):
                result.set_result(work())
        except Exception as error:  # noqa: BLE001 (the other thread raises it)
            result.set_exception(error)

    threading.Thread(target=run, name="mergeopd-weights", daemon=True).start()
    both: list[Future[Any]] = [result] if request is None else [request, result]
    wait(both, limit_s, FIRST_EXCEPTION)
    if request is not None and result.done() and result.exception() is not None:
        wait([request], _SAME_FAILURE_S)
    for one in both:
        error = one.exception() if one.done() else None
        if isinstance(error, ServingError):
            raise error
        if error is not None:
            message = f"{server.url}: the transfer of weights broke off: {error}"
            raise ServingError(message) from error
    if not all(one.done() for one in both):
        raise ServingError(f"{server.url}: the transfer of weights did not end within {limit_s:.0f} s")
    return result.result()


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def listener_towards(url: str) -> socket.socket:
    """Return a listening socket on a free port, with the address at which a server reaches this machine."""
    host = urlsplit(url).hostname or ""
    family, kind, _, _, there = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(there)  # sends nothing
        return socket.create_server((probe.getsockname()[0], 0), family=family)
