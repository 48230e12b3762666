"""Start a fork server and run programs on it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeopd.errors import SandboxError
from mergeopd.sandbox.isolation import MECHANISMS, Mechanism

_START_TIMEOUT_S = 60.0
_GRACE_S = 5.0
_ROOT = Path(__file__).parents[2]
_REMEDY = (
    "run on Linux with unprivileged user namespaces (sysctl user.max_user_namespaces, and in a container "
    "--security-opt seccomp=unconfined) or with Landlock (kernel 5.13 or later)"
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use. `timeout_s` is wall time; CPU time has the same limit, per process."""

    timeout_s: float = 10.0
    memory_mb: int = 512
    file_mb: int = 16


@dataclass(frozen=True, slots=True)
class UnitTests:
    """Python statements that test a program.

    `setup` runs before them in the tests' process. The names that they use and do not define are the
    program's; `program_names` are the program's although `setup` defines them.
    """

    tests: str
    setup: str = ""
    program_names: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether all tests passed, else why not."""

    passed: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ScriptOutcome:
    """What a script wrote. `exit_code` is None at the time limit and negative for a signal."""

    exit_code: int | None
    stdout: str
    stderr: str


class Sandbox:
    """A fork server, started when first used. One program runs at a time; use one sandbox per core."""

    def __init__(self) -> None:
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self.mechanism: Mechanism | None = None

    def __enter__(self) -> Sandbox:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, mechanisms: Sequence[Mechanism] = MECHANISMS) -> None:
        """Start the server with the first mechanism that works. Raises SandboxError if none does."""
        if self._control is not None:
            return
        reasons = []
        for mechanism in mechanisms:
            reason = self._launch(mechanism)
            if reason is None:
                self.mechanism = mechanism
                return
            self.close()
            reasons.append(f"{mechanism}: {reason}")
        raise SandboxError(f"programs cannot be isolated here ({'; '.join(reasons)}); {_REMEDY}")

    def test(self, program: str, tests: UnitTests, limits: Limits) -> Outcome:
        """Run tests of a program. Raises SandboxError if the sandbox itself fails."""
        given = {"setup": tests.setup, "tests": tests.tests, "program_names": list(tests.program_names)}
        with contextlib.ExitStack() as stack:
            code, tested, result = (
                stack.enter_context(_memory_file(text)) for text in (program, json.dumps(given), "")
            )
            roles = {"program": {"program": code}, "tests": {"tests": tested, "result": result}}
            exit_code = self._request(roles, limits)
            if exit_code is None:
                return Outcome(False, f"it took more than {limits.timeout_s:g} s")
            text = _content(result)
        if exit_code != 0 or not text:
            return Outcome(False, "the tests ended their process")
        return Outcome(**json.loads(text))

    def run(self, program: str, stdin: str, limits: Limits) -> ScriptOutcome:
        """Run a program as a script. Raises SandboxError if the sandbox itself fails."""
        with contextlib.ExitStack() as stack:
            files = {
                name: stack.enter_context(_memory_file(text))
                for name, text in (("program", program), ("stdin", stdin), ("stdout", ""), ("stderr", ""))
            }
            exit_code = self._request({"script": files}, limits)
            return ScriptOutcome(exit_code, _content(files["stdout"]), _content(files["stderr"]))

    def close(self) -> None:
        """End the server and its programs. It starts again when needed."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        if self._scratch is not None:
            self._scratch.cleanup()
        self._control = self._process = self._scratch = None

    def _launch(self, mechanism: Mechanism) -> str | None:
        """Start a server; return why it cannot isolate."""
        self._control, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(_START_TIMEOUT_S)
        scratch = ""
        if mechanism == "landlock":  # namespaces have their own file system
            self._scratch = tempfile.TemporaryDirectory(
                prefix="mergeopd-sandbox-", ignore_cleanup_errors=True
            )
            scratch = self._scratch.name
        library_path = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
        entry = f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from mergeopd.sandbox.server import main"
        arguments = f"{other.fileno()}, {mechanism!r}, {scratch!r}"
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-s", "-P", "-B", "-c", f"{entry}; main({arguments})"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                cwd="/",
                start_new_session=True,  # it cleans up after a worker that is killed
                env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "LANG": "C.UTF-8", **library_path},
            )
        reply = self._reply()
        return reply.get("refused")

    def _request(self, roles: Mapping[str, Mapping[str, int]], limits: Limits) -> int | None:
        """Run the processes of a request; return the exit code of the last, or None at the time limit."""
        self.start()
        assert self._control is not None
        request: dict[str, Any] = {
            "roles": {role: list(names) for role, names in roles.items()},
            "timeout_s": limits.timeout_s,
            "memory_mb": limits.memory_mb,
            "file_mb": limits.file_mb,
            "cpu_s": int(limits.timeout_s) + 1,
        }
        self._control.settimeout(limits.timeout_s + _GRACE_S)
        descriptors = [descriptor for names in roles.values() for descriptor in names.values()]
        try:
            socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)
            code: int | None = self._reply()["code"]
        except OSError as error:
            self.close()
            raise SandboxError(f"the sandbox's server does not answer: {error}") from error
        return code

    def _reply(self) -> dict[str, Any]:
        assert self._control is not None
        data = self._control.recv(1 << 16)
        if not data:
            self.close()
            raise SandboxError("the sandbox's server ended; the machine may be out of memory")
        reply: dict[str, Any] = json.loads(data)
        return reply


@functools.cache
def sandbox_problem() -> str | None:
    """Return why programs cannot be isolated on this machine, and the remedy; None if they can."""
    try:
        with Sandbox():
            return None
    except SandboxError as error:
        return str(error)


@contextlib.contextmanager
def _memory_file(text: str) -> Any:
    descriptor = os.memfd_create("sandbox")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(text.encode("utf-8", "surrogatepass"))
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _content(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(descriptor, "rb", closefd=False) as file:
        return file.read().decode("utf-8", "replace")
