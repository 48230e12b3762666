"""`mergeopd run --nproc N`: start, monitor and stop N processes of one command on this machine.

Does not import torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from mergeopd.distributed.rendezvous import BLOCKED_SIGNALS, LAUNCHER, RENDEZVOUS

STOPPED = 3
STOPPED_BY_ALARM = 4

_POLL_S = 0.05
# Seconds until the remaining processes are killed: after one has failed, and after a second Ctrl-C.
_GRACE_S = 10
_INTERRUPT_GRACE_S = 3


def launch(command: Sequence[str], num_processes: int) -> int:
    """Start the command as ranks 0 to N - 1 and wait for all of them; none is left running.

    Returns 0 if all succeeded, 3 or 4 if the others stopped on request or by an alarm, 1 if a process was
    killed by a signal,
    else the exit code of the first failure. SIGTERM and Ctrl-C are forwarded to all processes.
    """
    with tempfile.TemporaryDirectory(prefix="mergeopd-") as folder:
        group = _Group()
        try:
            group.start(command, num_processes, Path(folder) / "rendezvous")
            return group.wait()
        finally:
            group.end()


class _Group:
    """The processes, in a separate process group, so that they receive signals from the launcher only.

    A Ctrl-C, which a terminal sends to its whole foreground group, is therefore not counted twice.
    """

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._interrupts = 0
        self._has_terminated = False
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def start(self, command: Sequence[str], size: int, rendezvous: Path) -> None:
        # Signals are blocked until the handlers are installed, and in the processes until `join_launcher`:
        # a Ctrl-C while Python starts must not cause tracebacks.
        signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
        try:
            for rank in range(size):
                leader = self._processes[0].pid if self._processes else 0
                environment = {**os.environ, **_environment(rank, size, rendezvous)}
                self._processes.append(
                    subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=leader)
                )
            handlers = {
                signal.SIGINT: self._interrupt,
                signal.SIGTERM: self._terminate,
                signal.SIGTSTP: self._pause,
                signal.SIGALRM: self._kill,
            }
            self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED_SIGNALS)

    def wait(self) -> int:
        failure: int | None = None
        running = self._processes
        while running:
            ended = [process for process in running if process.poll() is not None]
            for process in ended:
                if failure is None and self._is_killed(process.returncode):
                    self._kill()
                    self._report_killed(process)
                    failure = 1
            for process in ended:
                if failure is None and process.returncode not in (0, STOPPED, STOPPED_BY_ALARM):
                    code = process.returncode
                    failure = 128 - code if code < 0 else code  # below 0: stopped before it could handle it
                    signal.alarm(_GRACE_S)
            running = [process for process in running if process.returncode is None]
            if running:
                time.sleep(_POLL_S)
        if self._interrupts > 1 and failure is not None:
            return 128 + signal.SIGINT
        return failure or max(process.returncode for process in self._processes)

    def end(self) -> None:
        signal.alarm(0)
        self._kill()
        for process in self._processes:
            process.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _is_killed(self, code: int) -> bool:
        """Whether a process was ended by a signal that the launcher did not forward."""
        forwarded = {
            -signal.SIGTERM: self._has_terminated,
            -signal.SIGINT: self._interrupts > 0,
            -signal.SIGKILL: self._interrupts > 1,
        }
        return code < 0 and not forwarded.get(code, False)

    def _report_killed(self, process: subprocess.Popen[bytes]) -> None:
        size = len(self._processes)
        name, number = signal.Signals(-process.returncode).name, self._processes.index(process) + 1
        cause = ", often out of memory" if name == "SIGKILL" else ""
        print(
            f"error: process {number} of {size} was killed ({name}{cause}); the others were stopped. "
            "Run the same command to resume from the newest checkpoint.",
            file=sys.stderr,
            flush=True,
        )

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += 1
        self._send(signal.SIGINT)
        if self._interrupts > 1:
            signal.alarm(_INTERRUPT_GRACE_S)  # a process blocked in a collective does not handle SIGINT

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._has_terminated = True
        self._send(signal.SIGTERM)

    def _pause(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z: suspend and resume all processes together."""
        self._send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._send(signal.SIGCONT)

    def _kill(self, number: int = 0, frame: FrameType | None = None) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        # The process group id cannot be reused while a process has not been waited for.
        if any(process.returncode is None for process in self._processes):
            with suppress(ProcessLookupError):  # the last process has just been waited for
                os.killpg(self._processes[0].pid, number)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _environment(rank: int, size: int, rendezvous: Path) -> Mapping[str, str]:
    """Return the environment variables of a rank, with the names that torchrun uses."""
    own = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        RENDEZVOUS: str(rendezvous),
        LAUNCHER: str(os.getpid()),
    }
    defaults = {"OMP_NUM_THREADS": str(max(1, available_cores() // size))}
    if Path("/sys/class/net/lo").exists():
        defaults["GLOO_SOCKET_IFNAME"] = "lo"  # the host name may not resolve
    return own | {name: value for name, value in defaults.items() if name not in os.environ}
