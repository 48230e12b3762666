"""`--nproc`: N processes start and end together, however one of them or the launcher ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

DEADLINE_S = 60
LAUNCHER = """
import sys
from mergeopd.distributed import launch
launch._GRACE_S = launch._INTERRUPT_GRACE_S = 1
sys.exit(launch.launch([sys.executable, "-c", sys.argv[2]], int(sys.argv[1])))
"""
JOINED = """
import os, signal, sys
from mergeopd.distributed.rendezvous import join_launcher
rank = int(os.environ["RANK"])
def tell(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # whole lines, whoever else writes
"""
WAITS = "join_launcher(); tell('ready', os.getpid())\nwhile True: signal.pause()\n"

Launch = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def launched() -> Iterator[Launch]:
    """Starts `launch` over Python text, in a process group of its own; nothing outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def start(child: str, size: int, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(size), JOINED + child],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **environment},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=DEADLINE_S)  # ends when nobody holds the pipes any more


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=DEADLINE_S)
    return process.returncode, out, err


def ready(process: subprocess.Popen[str], size: int) -> list[int]:
    """Waits until all processes are; their numbers."""
    assert process.stdout is not None
    lines = [process.stdout.readline().split() for _ in range(size)]
    assert {words[0] for words in lines} == {"ready"}
    return [int(words[1]) for words in lines]


@pytest.mark.parametrize(
    ("codes", "expected"), [((0, 0, 0), 0), ((3, 3), 3), ((0, 3), 3), ((0, 2), 2), ((7, 3), 7)]
)
def test_exit_code_of_the_launcher(launched: Launch, codes: tuple[int, ...], expected: int) -> None:
    process = launched(f"join_launcher(); sys.exit({codes}[rank])", len(codes))
    assert ended(process) == (expected, "", "")


def test_environment_of_a_process(launched: Launch) -> None:
    child = """
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
meeting = os.environ["MERGEOPD_RENDEZVOUS"]
tell(*(os.environ[n] for n in names), os.path.exists(meeting), os.path.isdir(os.path.dirname(meeting)))
tell("folder", os.path.dirname(meeting))
"""
    code, out, err = ended(launched(child, 2, OMP_NUM_THREADS="5"))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert sorted(line for line in lines if "folder" not in line) == [
        "0 0 2 2 5 False True",
        "1 1 2 2 5 False True",
    ]
    (folder,) = {line.split()[1] for line in lines if "folder" in line}
    assert not Path(folder).exists()


def test_a_killed_process_ends_all(launched: Launch) -> None:
    process = launched(WAITS, 3)
    pids = ready(process, 3)
    os.kill(pids[1], signal.SIGKILL)
    code, out, err = ended(process)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert err.startswith("error: process ")
    assert err.endswith(
        " of 3 was killed (SIGKILL, often out of memory); the others were stopped. "
        "Run the same command to resume from the newest checkpoint.\n"
    )


def test_the_killed_process_and_its_signal_are_reported(launched: Launch) -> None:
    code, _, err = ended(launched("rank == 1 and os.abort()\n" + WAITS, 2))
    assert code == 1
    assert err.startswith("error: process 2 of 2 was killed (SIGABRT); the others were stopped. ")


def test_others_of_a_failure_end_within_the_grace(launched: Launch) -> None:
    assert ended(launched("rank == 0 and sys.exit(5)\nsignal.pause()", 3)) == (5, "", "")


def test_a_request_to_stop_reaches_all(launched: Launch) -> None:
    child = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n" + WAITS
    process = launched(child, 3)
    ready(process, 3)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (3, "", "")


def test_a_request_before_they_listen_is_no_accident(launched: Launch) -> None:
    process = launched(WAITS, 2)
    ready(process, 2)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (128 + signal.SIGTERM, "", "")


COUNTS = """
count = 0
def interrupt(*_):
    global count
    count += 1
    tell("interrupted")
def terminate(*_):
    tell(count)
    sys.exit(3)
signal.signal(signal.SIGINT, interrupt)
signal.signal(signal.SIGTERM, terminate)
"""


@pytest.mark.parametrize("whole_group", [True, False])
def test_a_ctrl_c_counts_once(launched: Launch, whole_group: bool) -> None:
    process = launched(COUNTS + WAITS, 2)
    ready(process, 2)
    send = os.killpg if whole_group else os.kill
    send(process.pid, signal.SIGINT)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["interrupted\n"] * 2
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (3, "1\n1\n", "")


def test_a_second_ctrl_c_ends_processes_that_ignore_it(launched: Launch) -> None:
    process = launched(COUNTS + WAITS, 2)
    ready(process, 2)
    assert process.stdout is not None
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        assert [process.stdout.readline() for _ in range(2)] == ["interrupted\n"] * 2
    assert ended(process) == (130, "", "")


@pytest.mark.skipif(
    sys.platform != "linux", reason="the system tells processes of their parent's end on Linux"
)
def test_no_process_outlives_a_killed_launcher(launched: Launch, tmp_path: Path) -> None:
    process = launched(WAITS, 2, TMPDIR=str(tmp_path))  # its folder stays behind
    ready(process, 2)
    process.kill()
    assert ended(process) == (-signal.SIGKILL, "", "")  # reads to the end: nobody has the pipe any more
