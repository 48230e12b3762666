"""Worker processes for verifiers that could hang, crash or take all memory."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from mergeopd.errors import VerifierError
from mergeopd.reward.worker import START_TIMEOUT_S

_MAX_FAILED_STARTS = 3
# Workers that die before they have read a response are replaced once for it.
_MAX_ATTEMPTS = 2
# How often a caller hears of progress, and so can leave, while verifiers are slow.
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Job:
    """One response for a worker. `request` is JSON, with the verifier's name as `source`."""

    request: dict[str, Any]
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Grade:
    """A reward in [0, 1], or None and why there is none."""

    reward: float | None
    failure: str | None = None


def failures_note(source: str, failures: Sequence[str]) -> str:
    """Describe failed verifications of one source in a line."""
    responses = "1 response" if len(failures) == 1 else f"{len(failures)} responses"
    return f"the verifier of {source} failed on {responses}; the first: {failures[0]}"


@dataclass(eq=False)
class _Worker:
    """A process, what it is doing and until when."""

    process: subprocess.Popen[bytes]
    deadline: float
    job: int | None = None
    is_ready: bool = False
    received: bytes = field(default=b"", repr=False)

    def kill(self) -> None:
        """End the process and those that user code started in its session."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(OSError):  # bytes that it never read
                pipe.close()


class WorkerPool:
    """Runs jobs on at most `num_workers` processes, which start when first needed and stay until `close`."""

    def __init__(self, setup: dict[str, Any], num_workers: int) -> None:
        self._setup = json.dumps(setup).encode() + b"\n"
        self._num_workers = num_workers
        self._workers: list[_Worker] = []
        self._num_failed_starts = 0
        self._finalizer = weakref.finalize(self, _kill_all, self._workers)

    def start(self) -> None:
        """Start one worker and wait until its verifiers are built.

        Raises:
            VerifierError: a verifier cannot be built, or importing its code takes too long.
        """
        if not self._workers:
            self._spawn()
        while not self._workers[0].is_ready:
            with self._selector() as selector:
                for worker in self._readable(selector):
                    for reply in self._replies(worker):
                        self._take_start(worker, reply, max_failures=1)
                self._expire_starts(max_failures=1)

    def run(self, jobs: Sequence[Job], on_progress: Callable[[int], None]) -> list[Grade]:
        """Return the verdicts of all jobs, in their order.

        A job that fails, ends its worker or exceeds its time limit has a verdict without a reward; the worker
        is replaced. `on_progress` gets the number of finished jobs several times a second and may raise.

        Raises:
            VerifierError: workers can no longer be started.
        """
        grades: dict[int, Grade] = {}
        attempts = [0] * len(jobs)
        waiting = deque(range(len(jobs)))
        try:
            while len(grades) < len(jobs):
                self._assign(jobs, waiting, attempts, grades)
                with self._selector() as selector:
                    for worker in self._readable(selector):
                        for reply in self._replies(worker):
                            self._take(worker, reply, grades)
                self._expire(jobs, grades)
                on_progress(len(grades))
        finally:
            for worker in [worker for worker in self._workers if worker.job is not None]:
                self._drop(worker)
        return [grades[index] for index in range(len(jobs))]

    def close(self) -> None:
        """End all workers."""
        _kill_all(self._workers)

    def _spawn(self) -> None:
        # -P: the folder that the command was given in must not shadow the standard library.
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "OMP_NUM_THREADS": "1",
        }
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mergeopd.reward.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the run
        )
        worker = _Worker(process, time.monotonic() + START_TIMEOUT_S)
        self._workers.append(worker)
        self._send(worker, self._setup)

    def _send(self, worker: _Worker, line: bytes) -> bool:
        """Whether the worker could be given a line."""
        assert worker.process.stdin is not None
        try:
            view = memoryview(line)
            while view:
                view = view[worker.process.stdin.write(view) :]
        except OSError:
            return False
        return True

    def _assign(
        self, jobs: Sequence[Job], waiting: deque[int], attempts: list[int], grades: dict[int, Grade]
    ) -> None:
        """Give every idle worker a job, and start as many workers as there is work for."""
        for worker in [worker for worker in self._workers if worker.is_ready and worker.job is None]:
            if not waiting:
                return
            index = waiting.popleft()
            job = jobs[index]
            attempts[index] += 1
            line = json.dumps({**job.request, "timeout_s": job.timeout_s}).encode() + b"\n"
            if self._send(worker, line):
                worker.job, worker.deadline = index, time.monotonic() + job.timeout_s
                continue
            self._drop(worker)
            if attempts[index] < _MAX_ATTEMPTS:
                waiting.appendleft(index)
            else:
                grades[index] = Grade(None, "its process ended before it read the response")
        num_starting = sum(not worker.is_ready for worker in self._workers)
        room = self._num_workers - len(self._workers)
        for _ in range(min(room, len(waiting) - num_starting)):
            self._spawn()

    def _selector(self) -> selectors.BaseSelector:
        selector = selectors.DefaultSelector()
        for worker in self._workers:
            if worker.job is not None or not worker.is_ready:
                assert worker.process.stdout is not None
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        return selector

    def _readable(self, selector: selectors.BaseSelector) -> list[_Worker]:
        busy = [worker.deadline for worker in self._workers if worker.job is not None or not worker.is_ready]
        left = min(busy, default=0.0) - time.monotonic()
        return [key.data for key, _ in selector.select(min(max(left, 0.0), _POLL_S))]

    def _replies(self, worker: _Worker) -> list[dict[str, Any] | None]:
        """Complete lines that the worker wrote; None where it ended."""
        assert worker.process.stdout is not None
        content = os.read(worker.process.stdout.fileno(), 65536)
        if not content:
            return [None]
        *lines, worker.received = (worker.received + content).split(b"\n")
        return [json.loads(line) for line in lines]

    def _take(self, worker: _Worker, reply: dict[str, Any] | None, grades: dict[int, Grade]) -> None:
        if not worker.is_ready:
            self._take_start(worker, reply, _MAX_FAILED_STARTS)
            return
        index, worker.job = worker.job, None
        if index is None:
            return
        if reply is None:
            grades[index] = Grade(None, "it ended its process")
            self._drop(worker)
        else:
            grades[index] = Grade(reply.get("reward"), reply.get("failure"))

    def _take_start(self, worker: _Worker, reply: dict[str, Any] | None, max_failures: int) -> None:
        if reply == {}:
            worker.is_ready, self._num_failed_starts = True, 0
            return
        self._drop(worker)
        self._count_failed_start(
            "a verifier ended its process while it was imported" if reply is None else reply["failure"],
            max_failures,
        )

    def _count_failed_start(self, cause: str, max_failures: int) -> None:
        self._num_failed_starts += 1
        if self._num_failed_starts >= max_failures:
            raise VerifierError(cause)

    def _expire_starts(self, max_failures: int) -> None:
        now = time.monotonic()
        for worker in [worker for worker in self._workers if not worker.is_ready and worker.deadline <= now]:
            self._drop(worker)
            self._count_failed_start(
                f"importing the verifiers' code took more than {START_TIMEOUT_S:g} s; "
                "move slow work from the module into the function",
                max_failures,
            )

    def _expire(self, jobs: Sequence[Job], grades: dict[int, Grade]) -> None:
        self._expire_starts(_MAX_FAILED_STARTS)
        now = time.monotonic()
        for worker in [worker for worker in self._workers if worker.job is not None]:
            if worker.deadline <= now:
                assert worker.job is not None
                limit = jobs[worker.job].timeout_s
                grades[worker.job] = Grade(None, f"it took more than {limit:g} s (timeout_s)")
                self._drop(worker)

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()


def _kill_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()
