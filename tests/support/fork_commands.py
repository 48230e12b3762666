"""Run Python commands as forks of one process that has imported torch and mergeopd: imports take seconds.

    python fork_commands.py

reads one JSON request per line, `{"commands": [COMMAND, ...]}`, runs its commands at the same time and writes
the list of their exit codes (negative: a signal). A COMMAND has `argv` (arguments of the interpreter: a script
or `-m MODULE`, and its own), `env`, `out` and `err` (files), and `size`: 0, or the number of ranks with which
`mergeopd.distributed.launch` starts it, killing the others after `grace_s` seconds.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1
WARM = (
    "torch.distributed",
    "transformers.models.stablelm.modeling_stablelm",
    "mergeopd.cli",
    "mergeopd.engine.run",
    "mergeopd.distributed.communicator",
)


class Fork:
    """The part of subprocess.Popen that `mergeopd.distributed.launch` uses."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], stdin: int, process_group: int
    ) -> None:
        assert stdin == subprocess.DEVNULL
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, process_group)
            end_as_interpreter(partial(run_python, command[1:], env))
        os.setpgid(self.pid, process_group)

    def poll(self) -> int | None:
        return self._reap(os.WNOHANG)

    def wait(self) -> int | None:
        return self._reap(0)

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def run_python(argv: Sequence[str], env: Mapping[str, str]) -> None:
    """Execute what `python *argv` executes."""
    os.environ.clear()
    os.environ.update(env)
    if argv[0] == "-m":
        sys.argv = list(argv[1:])
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(argv)
        runpy.run_path(argv[0], run_name="__main__")


def launch(command: Mapping[str, Any]) -> None:
    from mergeopd.distributed import launch

    launch._GRACE_S = command["grace_s"]
    launch.subprocess.Popen = Fork  # type: ignore[misc, assignment]
    os.environ.clear()
    os.environ.update(command["env"])
    sys.exit(launch.launch([sys.executable, *command["argv"]], command["size"]))


def end_as_interpreter(work: Callable[[], None]) -> NoReturn:
    """End this process as the interpreter does after `work`."""
    code = 0
    try:
        work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - the fork must not continue as its parent
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(command: Mapping[str, Any]) -> int:
    """Fork a process for a command; its id."""
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(command[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(command["cwd"])
        end_as_interpreter(
            partial(launch, command)
            if command["size"]
            else partial(run_python, command["argv"], command["env"])
        )
    return child


def main() -> None:
    for name in WARM:
        importlib.import_module(name)
    gc.freeze()  # the forks need not collect the imported modules
    for line in sys.stdin:
        children = [start(command) for command in json.loads(line)["commands"]]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main()
