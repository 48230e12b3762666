"""A fork server: one warm interpreter that forks an isolated process for every program.

Requests are JSON messages with descriptors over the socket whose number is the argument. The server reads
neither programs nor tests, so that nothing of earlier ones is in the memory that its children inherit.
Standard library only.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mergeopd.sandbox.isolation import Isolation, IsolationError, isolate, standard_library
from mergeopd.sandbox.programs import run_script, run_tests, serve_program

_COMMON = (
    "abc", "array", "asyncio", "base64", "binascii", "bisect", "calendar", "cmath", "collections", "copy",
    "csv", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools", "hashlib", "heapq", "html",
    "io", "itertools", "json", "math", "numbers", "operator", "queue", "random", "re", "statistics", "string",
    "struct", "textwrap", "threading", "time", "typing", "unicodedata", "unittest.mock", "urllib.parse",
)  # fmt: skip
_ROLES: Mapping[str, Callable[[Mapping[str, int]], int]] = {
    "script": run_script,
    "program": serve_program,
    "tests": run_tests,
}
_MAX_REQUEST, _MAX_DESCRIPTORS = 1 << 16, 16
_POLL_S = 0.1


def main(descriptor: int, mechanism: Any, scratch: str) -> None:
    """Isolate this process, then serve requests until the socket closes."""
    control = socket.socket(fileno=descriptor)
    _prepare()
    try:
        isolation = isolate(mechanism, Path(scratch))
    except IsolationError as error:
        control.send(json.dumps({"refused": str(error)}).encode())
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    gc.collect()
    gc.freeze()
    control.send(b"{}")
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, _MAX_REQUEST, _MAX_DESCRIPTORS)
        if not data:
            break
        result = _run(json.loads(data), descriptors, isolation, control)
        _empty(isolation.scratch)
        with contextlib.suppress(BrokenPipeError):
            control.send(json.dumps(result).encode())
    shutil.rmtree(isolation.scratch, ignore_errors=True)


def _prepare() -> None:
    """Import what programs often import, and load the libraries of all extension modules.

    A library that is loaded need not be found again, so the new root holds no system libraries.
    """
    sys.path[:] = [path for path in sys.path if Path(path).resolve() in standard_library()]
    extensions = [folder / "lib-dynload" for folder in standard_library()]
    files = [file.name for folder in extensions if folder.is_dir() for file in folder.iterdir()]
    sys.path += [str(folder) for folder in extensions if str(folder) not in sys.path and folder.is_dir()]
    names = {name.partition(".")[0] for name in files if name.endswith(".so")}
    for name in (*_COMMON, *sorted(name for name in names if "test" not in name and name != "_tkinter")):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    os.environ.clear()


def _run(
    request: dict[str, Any], descriptors: list[int], isolation: Isolation, control: socket.socket
) -> dict[str, Any]:
    """Run the processes of a request.

    All end when the last of `roles` does, at the time limit, when the scratch folder is full, or when nobody
    waits for the result.
    """
    given = iter(descriptors)
    ends = [end.detach() for end in socket.socketpair()]
    pids: dict[int, str] = {}
    for role, names in request["roles"].items():
        own = {name: next(given) for name in names}
        if len(request["roles"]) > 1:
            own["peer"] = ends[len(pids)]
        pid = os.fork()
        if pid == 0:
            _become(role, own, request, isolation)
        pids[pid] = role
    for each in (*descriptors, *ends):
        os.close(each)
    last = [*request["roles"]][-1]
    deadline = time.monotonic() + request["timeout_s"]
    codes: dict[str, int] = {}
    while last not in codes and (left := deadline - time.monotonic()) > 0:
        signal.sigtimedwait({signal.SIGCHLD}, min(left, _POLL_S))
        for pid in list(pids):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
        if isolation.is_full() or _is_closed(control):
            break
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return {"code": codes.get(last)}


def _is_closed(control: socket.socket) -> bool:
    try:
        return not control.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False


def _become(role: str, own: dict[str, int], request: dict[str, Any], isolation: Isolation) -> None:
    """Run a role in this new process and exit."""
    code = 70
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        # The process keeps its own descriptors, numbered from 0, and nothing else.
        null = os.open("/dev/null", os.O_RDWR)
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            os.dup2(own.pop(name, null), number)
        moved = {name: os.dup2(descriptor, 900 + i) for i, (name, descriptor) in enumerate(own.items())}
        os.environ["TMPDIR"] = tempfile.tempdir = str(isolation.scratch)
        random.seed(0)
        isolation.restrict(request["memory_mb"], request["file_mb"], request["cpu_s"])
        kept = {name: os.dup2(descriptor, 3 + i) for i, (name, descriptor) in enumerate(moved.items())}
        os.closerange(3 + len(kept), 1024)
        code = _ROLES[role](kept)
    except BaseException:  # noqa: BLE001
        pass
    finally:
        os._exit(code)


def _empty(folder: Path) -> None:
    """Remove what programs left. Ends the server if something stays."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            os.unlink(entry.path)
    if any(os.scandir(folder)):
        os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
