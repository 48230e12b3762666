"""Run a command in a process group of its own, and end the whole group when the command or the caller ends.

    python watch.py CALLER_PID GRACE_S COMMAND...

`mergeopd.serving.launch` starts this file as a process beside each server, as a caller that is killed cannot
clean up. The first line on stdout is the command's process id, which is also its group's. SIGTERM ends the
group. The exit status is the command's, or 128 + the signal that killed it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

POLL_S = 0.5
KILL_S = 10.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def _in_server() -> None:
    """Prepare the server's process, which Linux kills when the watching process is killed."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _end_group(group: int) -> None:
    """Kill what is left of a group, and wait until it has ended and its memory is free."""
    end = time.monotonic() + KILL_S
    with suppress(ProcessLookupError, ChildProcessError):
        while time.monotonic() < end:
            os.killpg(group, signal.SIGKILL)
            os.waitpid(-group, os.WNOHANG)
            time.sleep(0.02)


def main(caller: int, grace_s: float, command: list[str]) -> int:
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # workers whose server has ended become children of this process
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # a caller that ignores them would pass that on to the server
    # Blocked signals stay pending, so that sigtimedwait sees those that arrive before it is called.
    waited_for = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)
    server = subprocess.Popen(command, stdout=2, start_new_session=True, preexec_fn=_in_server)
    print(server.pid, flush=True)
    while server.poll() is None:
        received = signal.sigtimedwait(waited_for, POLL_S)
        if os.getppid() != caller or (received and received.si_signo != signal.SIGCHLD):
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(grace_s)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
    _end_group(server.pid)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
