"""Verifiers that raise, hang, crash or return invalid values cost one reward, not the run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from mergeopd.errors import VerifierError
from mergeopd.recipe.verifiers import Verifier
from mergeopd.reward.grading import Submission, Verifiers

MODULE = """
import os, sys, time
from pathlib import Path

class Unprintable(Exception):
    def __str__(self):
        raise ValueError

def length(response, reference):
    return min(1.0, len(response) / 100)

def behave(response, reference):
    match response:
        case "raise": raise KeyError("x")
        case "unprintable": raise Unprintable
        case "exit": sys.exit(1)
        case "die": os._exit(1)
        case "nan": return float("nan")
        case "none": return None
        case "print":
            print("noise", flush=True)
            os.write(1, b"more noise")
        case "close":
            sys.stdout.close()
        case "hang":
            while True: pass
        case "child":
            if child := os.fork():
                Path(reference).write_text(str(child))
            time.sleep(60)
    return 1.0
"""
ENOUGH = 60.0


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("code")
    (folder / "rewards_of_test_grading.py").write_text(MODULE)
    (folder / "broken_of_test_grading.py").write_text("1 / 0\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


def spec(**fields: object) -> Verifier:
    return TypeAdapter(Verifier).validate_python(fields)


def user(function: str, timeout_s: float = ENOUGH) -> Verifier:
    return spec(kind="user", function=f"rewards_of_test_grading:{function}", timeout_s=timeout_s)


ALLOWED = ("rewards_of_test_grading:behave", "rewards_of_test_grading:length")


@pytest.fixture(scope="module")
def verifiers(module: None) -> Iterator[Verifiers]:
    specs = {
        "patient": user("behave"),
        "hasty": user("behave", 0.2),
        "parent": user("behave", 1.0),  # time for the child to start
        "length": user("length"),
        "number": spec(kind="number"),
        "backtracking": spec(kind="regex", pattern=r"^(\w+\s?)*$", timeout_s=0.2),
        "regex": spec(kind="regex", pattern="^a", timeout_s=ENOUGH),
    }
    with Verifiers(specs, ALLOWED, 2) as found:
        yield found


def rewards(verifiers: Verifiers, *submissions: Submission) -> list[float | None]:
    return [grade.reward for grade in verifiers.verify(submissions, lambda done: None)]


@pytest.mark.parametrize(
    ("response", "failure"),
    [
        ("raise", "verifier function 'rewards_of_test_grading:behave' raised KeyError: 'x'"),
        ("unprintable", "ValueError: "),
        ("exit", "SystemExit: 1"),
        ("die", "it ended its process"),
        ("nan", "verifier function 'rewards_of_test_grading:behave' returned nan"),
        ("none", "verifier function 'rewards_of_test_grading:behave' returned None"),
    ],
)
def test_a_failure_costs_its_response_alone(verifiers: Verifiers, response: str, failure: str) -> None:
    found = verifiers.verify(
        [Submission("patient", t, None) for t in ("a", response, "b")], lambda done: None
    )
    assert [grade.reward for grade in found] == [1.0, None, 1.0]
    assert found[1].failure is not None
    assert found[1].failure.startswith(failure)


def test_a_bad_reference_of_a_cheap_verifier_costs_its_response_alone(verifiers: Verifiers) -> None:
    found = verifiers.verify([Submission("number", "5", r) for r in ("5", "five", None)], lambda done: None)
    assert [grade.reward for grade in found] == [1.0, None, None]
    assert (found[1].failure or "").startswith("verifier 'number': the reference 'five' is not one number")


def test_a_hanging_verifier_is_ended_at_its_time_limit(verifiers: Verifiers) -> None:
    found = verifiers.verify(
        [
            Submission("hasty", "hang", None),
            Submission("backtracking", "a" * 40 + "!", None),
            Submission("regex", "abc", None),
        ],
        lambda done: None,
    )
    assert [grade.reward for grade in found] == [None, None, 1.0]
    assert found[0].failure == found[1].failure == "it took more than 0.2 s (timeout_s)"


def test_output_of_a_function_does_not_disturb_it(verifiers: Verifiers) -> None:
    submissions = [Submission("patient", text, None) for text in ("print", "print", "print", "close", "a")]
    assert rewards(verifiers, *submissions) == [1.0] * 5


def test_processes_that_a_function_started_end_with_it(verifiers: Verifiers, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    assert rewards(verifiers, Submission("parent", "child", str(file))) == [None]
    child = int(file.read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _is_alive(child):
        os.sched_yield()
    assert not _is_alive(child)


def _is_alive(process: int) -> bool:
    """Running: whoever adopted it may not have waited for it yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_grades_are_in_order_for_several_workers(verifiers: Verifiers) -> None:
    submissions = [
        Submission("number", "5", "5") if i % 7 == 0 else Submission("length", "a" * i, None)
        for i in range(60)
    ]
    done: list[int] = []
    found = verifiers.verify(submissions, done.append)
    assert [grade.reward for grade in found] == [1.0 if i % 7 == 0 else i / 100 for i in range(60)]
    assert done == sorted(done)
    assert done[-1] == sum(i % 7 != 0 for i in range(60))


def test_an_exception_of_on_progress_ends_verification(verifiers: Verifiers) -> None:
    """A request to stop is met while a function hangs, long before its time limit."""

    def leave(done: int) -> None:
        raise InterruptedError

    start = time.monotonic()
    with pytest.raises(InterruptedError):
        verifiers.verify([Submission("patient", "hang", None)], leave)
    assert time.monotonic() - start < ENOUGH / 2
    assert rewards(verifiers, Submission("patient", "a", None)) == [1.0]


def test_the_last_number_of_a_truncated_response_is_not_the_answer(verifiers: Verifiers) -> None:
    assert rewards(
        verifiers,
        Submission("number", "so we add 5", "5", truncated=True),
        Submission("number", r"\boxed{5}. Now check", "5", truncated=True),
        Submission("number", "so we add 5", "5"),
    ) == [0.0, 1.0, 1.0]


def test_code_that_cannot_be_imported_is_refused_at_the_start() -> None:
    name = "broken_of_test_grading:score"
    with (
        Verifiers({"a": spec(kind="user", function=name)}, [name], 1) as verifiers,
        pytest.raises(VerifierError, match=r"importing 'broken_of_test_grading' raised ZeroDivisionError"),
    ):
        verifiers.start()


def test_cheap_verifiers_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.Popen", None)
    with Verifiers({"a": spec(kind="exact"), "b": spec(kind="number")}, (), 2) as verifiers:
        verifiers.start()
        assert rewards(verifiers, Submission("a", "x", "x"), Submission("b", "1/2", "0.5")) == [1.0, 1.0]


def test_workers_that_cannot_start_again_end_verification_at_once(tmp_path: Path) -> None:
    """Long before the time limit of a response that another worker verifies."""
    marker = tmp_path / "started"
    (tmp_path / "once_of_test_grading.py").write_text(
        "import time\nfrom pathlib import Path\n"
        f"marker = Path({str(marker)!r})\n"
        "if marker.exists():\n    raise OSError('second start')\n"
        "marker.touch()\n"
        "def score(response, reference):\n    time.sleep(float(response))\n    return 1.0\n"
    )
    name = "once_of_test_grading:score"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        with Verifiers({"a": spec(kind="user", function=name, timeout_s=ENOUGH)}, [name], 2) as verifiers:
            verifiers.start()
            start = time.monotonic()
            with pytest.raises(VerifierError, match="second start"):
                verifiers.verify([Submission("a", "30", None), Submission("a", "0", None)], lambda _: None)
            assert time.monotonic() - start < ENOUGH / 2
