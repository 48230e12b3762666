"""`mergeopd run --nproc N`: N processes of one command on this machine, started, watched and ended together.

Nothing here imports torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from mergeopd.distributed.rendezvous import HELD_BACK, LAUNCHER, RENDEZVOUS

STOPPED = 3

# What others may take to end by themselves after one has failed, and all after a second Ctrl-C.
_GRACE_S = 10
_AT_ONCE_S = 3


def launch(command: Sequence[str], num_processes: int) -> int:
    """Start the command as processes 0 to N - 1 of a group and wait for all of them; none survives.

    Returns 0, or 3 where all that did not end with 0 stopped on request, else 1 for a process that a signal
    killed and the first failure's own code otherwise. SIGTERM and Ctrl-C are handed on to all.
    """
    with tempfile.TemporaryDirectory(prefix="mergeopd-") as folder:
        group = _Group(num_processes)
        try:
            group.start(command, Path(folder) / "rendezvous")
            return group.wait()
        finally:
            group.end()


class _Group:
    """The processes, which form a process group of their own: signals come to them from here, each once.

    So a Ctrl-C, which a terminal sends to the whole of its foreground group, is not counted twice.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._processes: list[subprocess.Popen[bytes]] = []
        self._interrupts = 0
        self._has_terminated = False
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def start(self, command: Sequence[str], rendezvous: Path) -> None:
        """Start all, and hand on signals from then on."""
        # Held back until there is somebody to hand them on to; the processes begin so, too, and let go in
        # `join_launcher`: a Ctrl-C while Python starts must not end in tracebacks.
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
        try:
            for rank in range(self._size):
                leader = self._processes[0].pid if self._processes else 0
                environment = {**os.environ, **_environment(rank, self._size, rendezvous)}
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
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)

    def wait(self) -> int:
        """The exit code of the whole, when all have ended."""
        failure: int | None = None
        while ended := self._next_ended():
            for process in ended:
                if failure is None and self._is_killed(process.returncode):
                    self._kill()
                    self._tell_killed(process)
                    failure = 1
            for process in ended:
                if failure is None and process.returncode not in (0, STOPPED):
                    code = process.returncode
                    failure = 128 - code if code < 0 else code  # a request to stop that came too early
                    signal.alarm(_GRACE_S)
        if self._interrupts > 1 and failure is not None:
            return 128 + signal.SIGINT
        return failure or max(process.returncode for process in self._processes)

    def end(self) -> None:
        """Leave nothing behind, whatever happened here."""
        signal.alarm(0)
        self._kill()
        for process in self._processes:
            process.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _next_ended(self) -> list[subprocess.Popen[bytes]]:
        """Those that have ended since, at least one; empty when all had ended before."""
        running = {process.pid: process for process in self._processes if process.returncode is None}
        ended: list[subprocess.Popen[bytes]] = []
        while running:
            pid, status = os.waitpid(-self._processes[0].pid, os.WNOHANG if ended else 0)
            if pid == 0:
                break
            process = running.pop(pid)
            process.returncode = os.waitstatus_to_exitcode(status)
            ended.append(process)
        return ended

    def _is_killed(self, code: int) -> bool:
        """Whether a signal that nobody asked for ended a process."""
        asked = {
            -signal.SIGTERM: self._has_terminated,
            -signal.SIGINT: self._interrupts > 0,
            -signal.SIGKILL: self._interrupts > 1,
        }
        return code < 0 and not asked.get(code, False)

    def _tell_killed(self, process: subprocess.Popen[bytes]) -> None:
        name, number = signal.Signals(-process.returncode).name, self._processes.index(process) + 1
        cause = ", often out of memory" if name == "SIGKILL" else ""
        print(
            f"error: process {number} of {self._size} was killed ({name}{cause}); the others were stopped. "
            "Run the same command to resume from the newest checkpoint.",
            file=sys.stderr,
            flush=True,
        )

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += 1
        self._send(signal.SIGINT)
        if self._interrupts > 1:
            signal.alarm(_AT_ONCE_S)  # one that waits for another in a library does not hear it

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._has_terminated = True
        self._send(signal.SIGTERM)

    def _pause(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z: all pause, and go on together."""
        self._send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._send(signal.SIGCONT)

    def _kill(self, number: int = 0, frame: FrameType | None = None) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        # While one has not been waited for, the group's number is nobody else's.
        if any(process.returncode is None for process in self._processes):
            with suppress(ProcessLookupError):  # the last one was waited for just now
                os.killpg(self._processes[0].pid, number)


def _environment(rank: int, size: int, rendezvous: Path) -> Mapping[str, str]:
    """What tells a process its place; the names are those of torchrun."""
    own = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        RENDEZVOUS: str(rendezvous),
        LAUNCHER: str(os.getpid()),
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {"OMP_NUM_THREADS": str(max(1, cores // size))}
    if Path("/sys/class/net/lo").exists():
        defaults["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's own name may lead nowhere
    return own | {name: value for name, value in defaults.items() if name not in os.environ}
