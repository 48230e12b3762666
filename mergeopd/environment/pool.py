"""Worker processes for environments, each with the episodes of some responses."""

from __future__ import annotations

import json
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from mergeopd.errors import EnvironmentFailed
from mergeopd.recipe.environments import Environment
from mergeopd.reward.pool import WorkerProcess
from mergeopd.reward.worker import START_TIMEOUT_S

_MODULE = "mergeopd.environment.worker"
# Interval of `on_progress`, by which a caller can stop while environments are slow.
_POLL_S = 0.2
# An environment imports and connects when it begins.
_RESET_FACTOR = 3.0


@dataclass(frozen=True, slots=True)
class Request:
    """A message to the environment of one episode."""

    episode: int
    source: str
    content: Mapping[str, Any]


class EnvironmentPool:
    """Runs environments on at most `num_workers` processes, which start when first needed.

    An episode stays with its process. If an environment hangs or ends its process, its episode fails; the
    process is replaced, and its other episodes are repeated up to their last step when they continue.
    """

    def __init__(
        self, environments: Mapping[str, Environment], allow_code: Collection[str], num_workers: int
    ) -> None:
        setup = {
            "environments": {name: spec.model_dump() for name, spec in environments.items()},
            "allow_code": sorted(allow_code),
        }
        self._limits = {name: spec.timeout_s for name, spec in environments.items()}
        content = json.dumps(setup).encode()
        self._slots = [_Slot(content) for _ in range(max(1, num_workers))]
        self._num_episodes = 0
        weakref.finalize(self, _close, self._slots)

    def new_episodes(self, num: int) -> range:
        """Return the numbers of episodes to begin."""
        first = self._num_episodes
        self._num_episodes += num
        return range(first, self._num_episodes)

    def run(
        self, requests: Sequence[Request], on_progress: Callable[[int], None] = lambda _: None
    ) -> list[dict[str, Any]]:
        """Return the replies, in order; that of a request that failed has the reason as `failure`.

        `on_progress` gets the number of replies several times a second and may raise. Raises
        EnvironmentFailed if an environment cannot be built, or processes can no longer be started.
        """
        queues = defaultdict(list)
        for position, request in enumerate(requests):
            queues[request.episode % len(self._slots)].append(position)
        replies: dict[int, dict[str, Any]] = {}
        stopped = threading.Event()

        def work(slot: _Slot, positions: Sequence[int]) -> None:
            for position in positions:
                if stopped.is_set():
                    return
                request = requests[position]
                limit = self._limits[request.source]
                replies[position] = slot.ask(request.episode, request.content, limit)

        with ThreadPoolExecutor(len(self._slots)) as threads:
            try:
                pending = {threads.submit(work, self._slots[i], own) for i, own in queues.items()}
                while pending:
                    done, pending = wait(pending, _POLL_S, FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    on_progress(len(replies))
            except BaseException:
                stopped.set()
                self.close()  # ends the threads' waiting
                raise
        return [replies[position] for position in range(len(requests))]

    def end(self, episodes: Collection[int]) -> None:
        """Forget episodes."""
        for i, slot in enumerate(self._slots):
            slot.end([episode for episode in episodes if episode % len(self._slots) == i])

    def close(self) -> None:
        """End all processes and episodes. Processes start again when needed."""
        _close(self._slots)
        for slot in self._slots:
            slot.forget()


def _close(slots: Sequence[_Slot]) -> None:
    for slot in slots:
        slot.close()


@dataclass
class _Slot:
    """A process and what its episodes were asked so far; `_live` are those that the process has."""

    setup: bytes
    _worker: WorkerProcess | None = field(default=None, init=False)
    _asked: dict[int, list[tuple[bytes, float]]] = field(default_factory=dict, init=False)
    _live: set[int] = field(default_factory=set, init=False)

    def ask(self, episode: int, content: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        asked = self._asked.setdefault(episode, [])
        message = json.dumps({**content, "episode": episode}).encode()
        limit = limit_s * (_RESET_FACTOR if content["op"] == "reset" else 1.0)
        missing = [] if episode in self._live else asked
        reply: dict[str, Any] = {}
        for earlier, its_limit in (*missing, (message, limit)):
            reply = self._exchange(earlier, its_limit)
            if "failure" in reply:
                self._asked.pop(episode, None)
                self._live.discard(episode)
                return reply
        asked.append((message, limit))
        self._live.add(episode)
        return reply

    def end(self, episodes: Sequence[int]) -> None:
        for episode in episodes:
            self._asked.pop(episode, None)
        ended = [episode for episode in episodes if episode in self._live]
        self._live -= set(ended)
        if ended and self._worker is not None:
            self._exchange(json.dumps({"op": "end", "episode": -1, "episodes": ended}).encode(), 10.0)

    def forget(self) -> None:
        self._asked.clear()

    def close(self) -> None:
        worker, self._worker = self._worker, None
        self._live.clear()
        if worker is not None:
            worker.kill()

    def _exchange(self, message: bytes, limit_s: float) -> dict[str, Any]:
        worker = self._started()
        reply = None
        failure = "the environment ended its process"
        if worker.send(message):
            try:
                reply = worker.reply(limit_s)
            except TimeoutError:
                failure = f"the environment took more than {limit_s:g} s (timeout_s)"
        if reply is None:
            self.close()
            return {"failure": failure}
        return reply

    def _started(self) -> WorkerProcess:
        if self._worker is not None:
            return self._worker
        worker = self._worker = WorkerProcess(self.setup, _MODULE)
        try:
            reply = worker.reply(START_TIMEOUT_S)
        except TimeoutError:
            reply = {"failure": f"importing the environments' code took more than {START_TIMEOUT_S:g} s"}
        if reply is None or "failure" in reply:
            self.close()
            raise EnvironmentFailed(
                "an environment ended its process while it was imported"
                if reply is None
                else reply["failure"]
            )
        return worker
