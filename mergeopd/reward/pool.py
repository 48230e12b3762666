"""Worker processes for verifiers that could hang, crash or take all memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import Pipe
from typing import Any

from mergeopd.errors import VerifierError
from mergeopd.reward.worker import START_TIMEOUT_S

_MAX_FAILED_STARTS = 3
# A worker that ends before it has read a response is replaced once for it.
_MAX_ATTEMPTS = 2
# Interval of `on_progress`, by which a caller can stop while verifiers are slow.
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Grade:
    """A reward in [0, 1], or None and why there is none."""

    reward: float | None
    failure: str | None = None


def failures_note(source: str, failures: Sequence[str]) -> str:
    """Describe in a line that responses of one source could not be graded, by verifier or environment."""
    responses = "1 response" if len(failures) == 1 else f"{len(failures)} responses"
    return f"{responses} of {source} could not be graded; the first: {failures[0]}"


class WorkerProcess:
    """A process that runs a module, which reads `setup` and then answers one message at a time."""

    def __init__(self, setup: bytes, module: str = "mergeopd.reward.worker") -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "OMP_NUM_THREADS": "1",
        }
        self._connection, other = Pipe()
        with other:
            self._process = subprocess.Popen(
                # -P: the current folder must not shadow the standard library.
                [sys.executable, "-P", "-m", module, str(other.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                env=environment,
                start_new_session=True,  # Ctrl-C is for the run
            )
        self.send(setup)

    def send(self, message: bytes) -> bool:
        """Send a message; return False if the process has ended."""
        try:
            self._connection.send_bytes(message)
        except OSError:
            return False
        return True

    def reply(self, timeout_s: float) -> dict[str, Any] | None:
        """Wait for a reply; return None if the process ended. Raises TimeoutError."""
        try:
            if not self._connection.poll(timeout_s):
                raise TimeoutError
            reply: dict[str, Any] = json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError):
            return None
        return reply

    def kill(self) -> None:
        """End the process and those that user code started in its session."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self._process.kill()
        self._process.wait()


class WorkerPool:
    """Runs requests on at most `num_workers` processes, which start when first needed and stay until `close`.

    A request is JSON, with the verifier's name as `source`, and its time limit as `timeout_s`.
    """

    def __init__(self, setup: dict[str, Any], num_workers: int) -> None:
        self._setup = json.dumps(setup).encode()
        self._num_workers = num_workers
        self._workers: set[WorkerProcess] = set()
        self._idle: list[WorkerProcess] = []
        self._lock = threading.Lock()
        self._is_closed = False
        weakref.finalize(self, _kill_all, self._workers)

    def start(self) -> None:
        """Start one worker and wait until its verifiers are built.

        Raises VerifierError if a verifier cannot be built, or importing its code takes too long.
        """
        self._is_closed = False
        if not self._idle:
            self._idle.append(self._started(max_failures=1))

    def run(self, requests: Sequence[dict[str, Any]], on_progress: Callable[[int], None]) -> list[Grade]:
        """Return the grades of all requests, in their order.

        A request that fails, ends its worker or exceeds its time limit has a grade without a reward; the
        worker is replaced. `on_progress` gets the number of finished requests several times a second and may
        raise.

        Raises VerifierError if workers can no longer be started.
        """
        self._is_closed = False
        with ThreadPoolExecutor(self._num_workers) as threads:
            try:
                futures = [threads.submit(self._grade, request) for request in requests]
                num_done = 0
                while num_done < len(futures):
                    done, _ = wait(futures, _POLL_S, FIRST_EXCEPTION)
                    for future in done:
                        future.result()  # raises VerifierError
                    num_done = len(done)
                    on_progress(num_done)
                return [future.result() for future in futures]
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                self.close()  # ends the threads
                raise

    def close(self) -> None:
        """End all workers."""
        with self._lock:
            self._is_closed = True
            self._idle.clear()
            _kill_all(self._workers)

    def _grade(self, request: dict[str, Any]) -> Grade:
        message, limit = json.dumps(request).encode(), request["timeout_s"]
        for _ in range(_MAX_ATTEMPTS):
            try:
                worker = self._idle.pop()
            except IndexError:
                worker = self._started(_MAX_FAILED_STARTS)
            if not worker.send(message):
                self._drop(worker)
                continue
            try:
                reply = worker.reply(limit)
            except TimeoutError:
                self._drop(worker)
                return Grade(None, f"it took more than {limit:g} s (timeout_s)")
            if reply is None:
                self._drop(worker)
                return Grade(None, "it ended its process")
            self._idle.append(worker)
            return Grade(reply.get("reward"), reply.get("failure"))
        return Grade(None, "its process ended before it read the response")

    def _started(self, max_failures: int) -> WorkerProcess:
        """Start a worker and wait until its verifiers are built."""
        failure = "the verifiers were closed"
        for _ in range(max_failures):
            with self._lock:
                if self._is_closed:
                    break
                worker = WorkerProcess(self._setup)
                self._workers.add(worker)
            try:
                reply = worker.reply(START_TIMEOUT_S)
            except TimeoutError:
                failure = (
                    f"importing the verifiers' code took more than {START_TIMEOUT_S:g} s; "
                    "move slow work from the module into the function"
                )
            else:
                if reply == {}:
                    return worker
                failure = reply["failure"] if reply else "a verifier ended its process while it was imported"
            self._drop(worker)
        raise VerifierError(failure)

    def _drop(self, worker: WorkerProcess) -> None:
        with self._lock:
            if worker in self._workers:  # else `close` has ended it
                self._workers.remove(worker)
                worker.kill()


def _kill_all(workers: set[WorkerProcess]) -> None:
    while workers:
        workers.pop().kill()
