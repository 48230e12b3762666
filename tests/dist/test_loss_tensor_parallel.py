"""`fused_loss` with the vocabulary on 2 and 4 gloo ranks equals one process, values and gradients."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("loss_worker.py")
DEADLINE_S = 120


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """One spawn of four ranks for all cases; a rank that hangs or dies fails the tests with its output."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    outputs = [folder / f"rank{rank}.json" for rank in range(4)]
    logs = [folder / f"rank{rank}.log" for rank in range(4)]
    ranks = []
    for rank, (out, log) in enumerate(zip(outputs, logs, strict=True)):
        command = [sys.executable, str(WORKER), str(rank), "4", str(folder / "store"), str(out)]
        with log.open("wb") as sink:
            ranks.append(subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment))
    deadline = time.monotonic() + DEADLINE_S
    try:
        for process in ranks:
            process.wait(timeout=max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        pytest.fail(f"no result after {DEADLINE_S} s:\n" + "\n".join(log.read_text()[-2000:] for log in logs))
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    failed = [log.read_text()[-2000:] for log, process in zip(logs, ranks, strict=True) if process.returncode]
    assert not failed, "\n".join(failed)
    return [json.loads(out.read_text()) for out in outputs]


@pytest.mark.parametrize(("dtype", "bound"), [("torch.float64", 1e-10), ("torch.float32", 1e-5)])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd", "all", "none"])
@pytest.mark.parametrize("layout", ["2 even", "2 uneven", "2 padding only", "4 uneven", "4 padding only"])
def test_ranks_equal_one_process(reports, layout, divergence, dtype, bound):
    world = int(layout[0])
    for rank in range(world):
        for num_teachers in (1, 2):
            errors = dict(reports[rank]["errors"][f"{layout}|{divergence}|{dtype}|{num_teachers}"])
            assert errors.pop("padding") == 0.0
            assert max(errors.values()) < bound, (rank, num_teachers, errors)


@pytest.mark.parametrize(("dtype", "bound"), [("torch.float64", 1e-10), ("torch.float32", 2e-5)])
@pytest.mark.parametrize(
    "support",
    [
        "student tail",
        "teacher tail",
        "union tail",
        "union generalised",
        "all tail",
        "known tail",
        "known generalised",
    ],
)
@pytest.mark.parametrize("layout", ["2 even", "2 uneven", "2 padding only", "4 uneven", "4 padding only"])
def test_ranks_choose_one_support(reports, layout, support, dtype, bound):
    for report in reports[: int(layout[0])]:
        errors = dict(report["supports"][f"{layout}|{support}|{dtype}"])
        assert errors.pop("padding") == 0.0
        assert max(errors.values()) < bound, errors


def test_two_ranks_report_only_their_cases(reports):
    assert [len(report["errors"]) for report in reports] == [120, 120, 48, 48]


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("label", "ValueError: labels_N[3] = 37 is not in exactly one shard"),
        ("nan", "ArithmeticError: the logits of target 1: not finite at 4 of the tokens 0 to 3, first at 0"),
    ],
)
def test_all_ranks_raise_alike(reports, case, text):
    messages = {report["refusals"][case] for report in reports}
    assert len(messages) == 1
    assert messages.pop().startswith(text)


def test_a_rank_with_misfitting_shards_stops_all(reports):
    found = [report["refusals"]["shards"] for report in reports]
    assert found[1].startswith("ValueError: target 0 scores token ids [3, 23), the student [3, 24); give")
    for text in (found[0], found[2], found[3]):
        assert text == "ValueError: on another rank of the group, student and target shards do not match"
