"""Several real processes under gloo: however one of them ends, all end soon, and one text says why."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("process_worker.py")
DEADLINE_S = 90
LAUNCHER = """
import sys
from mergeopd.distributed import launch
launch._GRACE_S = int(sys.argv[2])
sys.exit(launch.launch([sys.executable, *sys.argv[3:]], int(sys.argv[1])))
"""
NO_WEIGHTS = "error: models/x: has no weights\n"
GOES_ON = "Run the same command to resume from the newest checkpoint.\n"


def launched(scene: str, size: int = 2, grace_s: int = 20) -> tuple[int, str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, str(size), str(grace_s), str(WORKER), scene],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


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
def test_one_text_and_one_code(scene: str, size: int, code: int, text: str) -> None:
    assert launched(scene, size) == (code, "", text)


def test_one_that_does_not_come_to_the_meeting() -> None:
    assert launched("own_error", grace_s=1) == (1, "", "error: models/x: is not on this disk\n")


def test_a_run_without_faults() -> None:
    assert launched("fine") == (0, "all here\n", "")


def test_arrays_are_the_same_on_every_process() -> None:
    assert launched("arrays", 3) == (0, "all the same\n", "")


@pytest.mark.parametrize("scene", ["bug", "bug_before"])
def test_a_bug_has_one_traceback(scene: str) -> None:
    code, out, err = launched(scene)
    assert (code, out) == (1, "")
    assert err.count("Traceback (most recent call last)") == 1
    assert err.count("ValueError: not what was expected") == 1
    assert ("(in process 2 of 2)" in err) == (scene == "bug")


def test_one_that_is_killed() -> None:
    code, out, err = launched("killed", 3)
    assert (code, out) == (1, "")
    assert err == (
        "error: process 2 of 3 was killed (SIGKILL, often out of memory); the others were stopped. "
        + GOES_ON
    )


def test_one_that_ends_without_a_word() -> None:
    """Those who lose it wait for it to be told, and then one of them tells."""
    code, out, err = launched("vanished", 3)
    assert (code, out) == (9, "")
    assert err.count("\n") == 1
    assert err.startswith("error: process ")
    assert " of 3 lost the connection to another process, which ended or does not respond; run the same command to resume" in err


def meeting_by_address(scene: str, size: int) -> list[tuple[int, str, str]]:
    """As torchrun or srun would start them: MASTER_ADDR instead of a file, and nobody who watches."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SLURM_NTASKS": str(size)}
    common = {**os.environ, **place, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), scene],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**common, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(size)
    ]
    deadline = time.monotonic() + DEADLINE_S
    try:
        said = [p.communicate(timeout=max(deadline - time.monotonic(), 0.1)) for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(p.returncode, *texts) for p, texts in zip(processes, said, strict=True)]


@pytest.mark.parametrize(
    ("scene", "code", "text"),
    [
        ("error_in_the_middle", 1, NO_WEIGHTS),
        ("recipe_error", 2, "x.yaml  seed\n    is wrong\n\n1 problem.\n"),
    ],
)
def test_without_the_launcher(scene: str, code: int, text: str) -> None:
    ended = meeting_by_address(scene, 2)
    assert [code for code, _, _ in ended] == [code] * 2
    assert sorted(err for _, _, err in ended) == ["", text]


def test_killed_without_the_launcher() -> None:
    ended = meeting_by_address("killed", 3)
    assert [code for code, _, _ in ended] == [1, -9, 1]
    (text,) = [err for _, _, err in ended if err]
    assert " of 3 lost the connection to another process, which ended or does not respond" in text


def test_a_process_alone_can_have_a_group() -> None:
    names = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "MASTER_ADDR")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, str(WORKER), "group"], capture_output=True, text=True, timeout=DEADLINE_S, env=environment, check=False
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "alone 1\n", "")


EVALUATED = {
    "evaluation": {
        "prompts": [{"source": "held_out.jsonl", "domain": "right", "verifier": "exact"}],
        "max_new_tokens": 2,
    }
}


def test_processes_measure_together(
    write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `mergeopd eval` finds in one, they find as well; they tell it once. One of three has no prompt."""
    (tmp_path / "held_out.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in (("a", "c"), ("b a", "b")))
    )
    recipe = write_job(EVALUATED).relative_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = ["-m", "mergeopd", "eval", str(recipe), "--model", "two", "--output"]
    told, documents = [], []
    for size in (1, 3):
        done = subprocess.run(
            [sys.executable, "-c", LAUNCHER, str(size), "20", *command, f"{size}.json"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        told.append(done.stdout.replace(f"{size}.json", "FILE"))
        documents.append(json.loads((tmp_path / f"{size}.json").read_text()))
    assert documents[0]["domains"] == documents[1]["domains"]
    assert told[1].count("right") == told[0].count("right") > 0


def test_what_eval_lacks_is_told_once(
    write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_job().relative_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, "2", "20", "-m", "mergeopd", "eval", str(recipe)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    text = "job.yaml  evaluation\n    missing section; add `evaluation.prompts`\n\n1 problem.\n"
    assert (done.stdout, done.stderr) == ("", text)
