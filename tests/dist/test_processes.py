"""Several processes under gloo: after any of them ends, all end soon, and one message gives the cause.

Most processes are forked from one that has imported torch (`tests/support/fork_commands.py`). One launch and
one rendezvous by address start new interpreters.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

SERVER = Path(__file__).parents[1] / "support" / "fork_commands.py"
WORKER = Path(__file__).with_name("process_worker.py")
DEADLINE_S = 90
GRACE_S = 20
LAUNCHER = """
import sys
from mergeopd.distributed import launch
launch._GRACE_S = int(sys.argv[2])
sys.exit(launch.launch([sys.executable, *sys.argv[3:]], int(sys.argv[1])))
"""
NO_WEIGHTS = "error: models/x: has no weights\n"
RESUME = "Run the same command to resume from the newest checkpoint.\n"
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "MASTER_ADDR")

Ended = tuple[int, str, str]  # exit code, stdout, stderr


def environment(**changes: str) -> dict[str, str]:
    """Environment of this process without a rank."""
    own = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return {**own, "OMP_NUM_THREADS": "1", **changes}


class Forks:
    """Runs commands in processes that are forked from a server."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def run(self, *commands: dict[str, Any]) -> list[Ended]:
        """Run commands at the same time (see the server) and wait for all of them."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        defaults = {"size": 0, "grace_s": GRACE_S, "env": environment(), "cwd": os.getcwd()}
        files = [[self._folder / f"{i}.{name}" for name in ("out", "err")] for i in range(len(commands))]
        request = [
            {**defaults, "out": str(out), "err": str(err), **command}
            for (out, err), command in zip(files, commands, strict=True)
        ]
        self._server.stdin.write(json.dumps({"commands": request}) + "\n")
        self._server.stdin.flush()
        alarm = threading.Timer(DEADLINE_S, self._server.kill)
        alarm.start()
        try:
            codes = json.loads(self._server.stdout.readline())
        finally:
            alarm.cancel()
        return [
            (code, out.read_text(), err.read_text()) for code, (out, err) in zip(codes, files, strict=True)
        ]

    def launch(self, argv: Sequence[str], size: int = 2, grace_s: int = GRACE_S) -> Ended:
        """Run a command as `mergeopd run --nproc SIZE` does."""
        [ended] = self.run({"argv": [*map(str, argv)], "size": size, "grace_s": grace_s})
        return ended

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(DEADLINE_S)


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def play(forks: Forks) -> Callable[..., Ended]:
    """Launch a scene of the worker."""

    def play(scene: str, size: int = 2, grace_s: int = GRACE_S) -> Ended:
        return forks.launch([str(WORKER), scene], size, grace_s)

    return play


@pytest.mark.parametrize(
    ("scene", "size", "code", "text"),
    [
        ("error_in_the_middle", 3, 1, NO_WEIGHTS),
        ("error_of_all", 2, 1, NO_WEIGHTS),
        ("error_in_a_share", 2, 1, NO_WEIGHTS),
        ("stopped", 2, 3, "stopped by --updates\n"),
        ("recipe_error", 2, 2, "x.yaml  seed\n    is wrong\n\n1 problem.\n"),
    ],
)
def test_one_message_and_one_exit_code(
    play: Callable[..., Ended], scene: str, size: int, code: int, text: str
) -> None:
    assert play(scene, size) == (code, "", text)


def test_an_error_of_one_process_before_the_rendezvous(play: Callable[..., Ended]) -> None:
    assert play("own_error", grace_s=1) == (1, "", "error: models/x: is not on this disk\n")


def test_a_run_without_faults_in_new_interpreters() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, "2", str(GRACE_S), str(WORKER), "fine"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "all here\n", "")


def test_arrays_are_the_same_on_every_process(play: Callable[..., Ended]) -> None:
    assert play("arrays", 3) == (0, "all the same\n", "")


@pytest.mark.parametrize("scene", ["bug", "bug_before"])
def test_a_bug_has_one_traceback(play: Callable[..., Ended], scene: str) -> None:
    code, out, err = play(scene)
    assert (code, out) == (1, "")
    assert err.count("Traceback (most recent call last)") == 1
    assert err.count("ValueError: not what was expected") == 1
    assert ("(in process 2 of 2)" in err) == (scene == "bug")


def test_a_killed_process_is_reported(play: Callable[..., Ended]) -> None:
    code, out, err = play("killed", 3)
    assert (code, out) == (1, "")
    assert err == (
        "error: process 2 of 3 was killed (SIGKILL, often out of memory); the others were stopped. " + RESUME
    )


def test_a_process_that_ends_without_an_error(play: Callable[..., Ended]) -> None:
    """The others wait for its report; as there is none, one of them reports the lost connection."""
    code, out, err = play("vanished", 3)
    assert (code, out) == (9, "")
    assert err.count("\n") == 1
    assert err.startswith("error: process ")
    assert (
        " of 3 lost the connection to another process, which ended or does not respond; "
        "run the same command to resume" in err
    )


def environments_with_address(size: int) -> list[dict[str, str]]:
    """Environments of the ranks under srun: MASTER_ADDR instead of a file, and no launcher of ours."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SLURM_NTASKS": str(size)}
    return [
        environment(**common, GLOO_SOCKET_IFNAME="lo", SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
        for rank in range(size)
    ]


def start_by_address(scene: str, size: int) -> list[Ended]:
    """Run a scene in new interpreters that connect by address."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), scene],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for env in environments_with_address(size)
    ]
    deadline = time.monotonic() + DEADLINE_S
    try:
        outputs = [p.communicate(timeout=max(deadline - time.monotonic(), 0.1)) for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(p.returncode, *texts) for p, texts in zip(processes, outputs, strict=True)]


def fork_by_address(forks: Forks, scene: str, size: int) -> list[Ended]:
    return forks.run(*({"argv": [str(WORKER), scene], "env": env} for env in environments_with_address(size)))


def test_an_error_without_the_launcher_in_new_interpreters() -> None:
    ended = start_by_address("error_in_the_middle", 2)
    assert [code for code, _, _ in ended] == [1, 1]
    assert sorted(err for _, _, err in ended) == ["", NO_WEIGHTS]


def test_an_error_before_the_rendezvous_without_the_launcher(forks: Forks) -> None:
    ended = fork_by_address(forks, "recipe_error", 2)
    assert [code for code, _, _ in ended] == [2, 2]
    assert sorted(err for _, _, err in ended) == ["", "x.yaml  seed\n    is wrong\n\n1 problem.\n"]


def test_a_killed_process_without_the_launcher(forks: Forks) -> None:
    ended = fork_by_address(forks, "killed", 3)
    assert [code for code, _, _ in ended] == [1, -9, 1]
    # torch may add warnings of its own, when the process with the store ends before another has asked it.
    (text,) = [line for _, _, err in ended for line in err.splitlines() if line.startswith("error: ")]
    assert " of 3 lost the connection to another process, which ended or does not respond" in text


def test_a_single_process_with_a_group(forks: Forks) -> None:
    [(code, out, err)] = forks.run({"argv": [str(WORKER), "group"]})
    assert (code, out.splitlines()[1:], err) == (0, ["alone 1"], "")


EVALUATED = {
    "evaluation": {
        "prompts": [{"source": "held_out.jsonl", "domain": "right", "verifier": "exact"}],
        "max_new_tokens": 2,
    }
}


def test_processes_evaluate_together(
    forks: Forks, write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three processes measure what one measures, and report it once. One of the three has no prompt."""
    (tmp_path / "held_out.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in (("a", "c"), ("b a", "b")))
    )
    recipe = write_job(EVALUATED).relative_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    outputs, documents = [], []
    for size in (1, 3):
        command = ["-m", "mergeopd", "eval", str(recipe), "--model", "two", "--output", f"{size}.json"]
        code, out, err = forks.launch(command, size)
        assert (code, err) == (0, "")
        outputs.append(out.replace(f"{size}.json", "FILE"))
        documents.append(json.loads((tmp_path / f"{size}.json").read_text()))
    assert documents[0]["suites"] == documents[1]["suites"]
    assert outputs[1].count("right") == outputs[0].count("right") > 0


def test_a_recipe_without_evaluation_is_reported_once(
    forks: Forks, write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_job().relative_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    _, out, err = forks.launch(["-m", "mergeopd", "eval", str(recipe)])
    text = "job.yaml  evaluation\n    missing section; add `evaluation.prompts`\n\n1 problem.\n"
    assert (len(out.splitlines()), err) == (1, text)  # the line that names the recipe
