"""Measure how many generated programs per minute the sandbox tests.

    python tools/bench_sandbox.py [--programs 200] [--workers 2] [--humaneval FILE] [--json]

The programs are small functions with three assertions, half of them wrong, or with `--humaneval` the
canonical solutions of HumanEval.jsonl.gz. Results are programs per minute on `--workers` processes:

- `verifiers`: as in a run, from responses to rewards
- `sandbox`: programs and tests in isolated processes of the fork server
- `bound`: program and tests in one new Python interpreter each (fork and exec), without any isolation
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeopd.recipe.verifiers import HumanEvalVerifier
from mergeopd.reward.grading import Submission, Verifiers
from mergeopd.sandbox.client import Limits, Sandbox, UnitTests

LIMITS = Limits(timeout_s=20.0)


@dataclass(frozen=True)
class Task:
    """Code to complete, a response, and its test."""

    code: str
    response: str
    test: str
    entry_point: str
    is_correct: bool

    @property
    def reference(self) -> str:
        return json.dumps({"code": self.code, "test": self.test, "entry_point": self.entry_point})


def main() -> None:
    arguments = parse()
    tasks = read_humaneval(arguments.humaneval) if arguments.humaneval else make_tasks(arguments.programs)
    result = measure(tasks, arguments.workers)
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--humaneval", type=Path, help="HumanEval.jsonl.gz")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    return parser.parse_args()


def make_tasks(num_programs: int) -> list[Task]:
    """Return different small tasks, every second with a wrong response."""
    tasks = []
    for number in range(num_programs):
        code = f'def count(text: str) -> int:\n    """Count the words, plus {number}."""\n'
        shown = number + number % 2
        test = "".join(f"    assert candidate({' '.join('a' * n)!r}) == {n + number}\n" for n in range(1, 4))
        tasks.append(
            Task(
                code=code,
                response=f"    return len(text.split()) + {shown}\n",
                test=f"def check(candidate):\n{test}",
                entry_point="count",
                is_correct=shown == number,
            )
        )
    return tasks


def read_humaneval(file: Path) -> list[Task]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [
        Task(row["prompt"], row["canonical_solution"], row["test"], row["entry_point"], True) for row in rows
    ]


def measure(tasks: Sequence[Task], num_workers: int) -> dict[str, Any]:
    """Return programs per minute of each way; all must agree with what is known of the responses."""
    expected = [task.is_correct for task in tasks]
    result: dict[str, Any] = {"num_programs": len(tasks), "num_workers": num_workers}
    with ExitStack() as stack:
        verifiers = stack.enter_context(
            Verifiers(
                {"code": HumanEvalVerifier(kind="humaneval", timeout_s=LIMITS.timeout_s)}, (), num_workers
            )
        )
        boxes = [stack.enter_context(Sandbox()) for _ in range(num_workers)]
        result["mechanism"] = boxes[0].mechanism
        ways: dict[str, Callable[[], list[bool]]] = {
            "verifiers": lambda: verify(verifiers, tasks),
            "sandbox": lambda: run_sandboxes(boxes, tasks),
            "bound": lambda: run_interpreters(tasks, num_workers),
        }
        verify(verifiers, tasks[:num_workers])  # starts the workers
        for name, way in ways.items():
            start = time.perf_counter()
            if way() != expected:
                raise SystemExit(f"{name}: rewards differ from what is known of the responses")
            result[f"{name}_per_minute"] = 60 * len(tasks) / (time.perf_counter() - start)
    return result


def verify(verifiers: Verifiers, tasks: Sequence[Task]) -> list[bool]:
    submissions = [Submission("code", task.response, task.reference) for task in tasks]
    return [grade.reward == 1.0 for grade in verifiers.verify(submissions, lambda _: None)]


def run_sandboxes(boxes: Sequence[Sandbox], tasks: Sequence[Task]) -> list[bool]:
    """Run every n-th task on the n-th sandbox."""

    def run(number: int) -> list[bool]:
        return [run_task(boxes[number], task) for task in tasks[number :: len(boxes)]]

    with ThreadPoolExecutor(len(boxes)) as threads:
        parts = list(threads.map(run, range(len(boxes))))
    return [parts[i % len(boxes)][i // len(boxes)] for i in range(len(tasks))]


def run_task(box: Sandbox, task: Task) -> bool:
    tests = UnitTests(f"{task.test}\n\ncheck({task.entry_point})\n", task.code, (task.entry_point,))
    return box.test(task.code + task.response, tests, LIMITS).passed


def run_interpreters(tasks: Sequence[Task], num_workers: int) -> list[bool]:
    def run(task: Task) -> bool:
        program = f"{task.code}{task.response}\n{task.test}\n\ncheck({task.entry_point})\n"
        command = [sys.executable, "-I", "-S", "-"]
        done = subprocess.run(command, input=program.encode(), capture_output=True, check=False)
        return done.returncode == 0

    with ThreadPoolExecutor(num_workers) as threads:
        return list(threads.map(run, tasks))


def show(result: dict[str, Any]) -> None:
    print(f"{result['num_programs']} programs, {result['num_workers']} workers, {result['mechanism']}")
    for name in ("verifiers", "sandbox", "bound"):
        speed = result[f"{name}_per_minute"]
        print(f"{name:10} {speed:8,.0f} programs/minute, {speed / result['bound_per_minute']:.2f} x bound")


if __name__ == "__main__":
    main()
