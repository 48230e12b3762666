"""Verifiers that run generated programs: references, extraction of programs, rewards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import TypeAdapter

from mergeopd.errors import VerifierError
from mergeopd.recipe.verifiers import Verifier
from mergeopd.reward.code import completed, program_of
from mergeopd.reward.grading import Submission, Verifiers
from mergeopd.reward.verifiers import build_verifier, reference_problem
from mergeopd.sandbox.client import Sandbox, sandbox_problem

CODE = '''from typing import List

def total(numbers: List[int]) -> int:
    """Returns the sum of squares."""
'''
BODY = "    return sum(n * n for n in numbers)\n"
TEST = "def check(candidate):\n    assert candidate([1, 2]) == 5\n    assert candidate([]) == 0\n"
TASK = json.dumps({"code": CODE, "test": TEST, "entry_point": "total"})


def spec(kind: str, **fields: Any) -> Verifier:
    return TypeAdapter(Verifier).validate_python({"kind": kind, **fields})


@pytest.fixture(scope="module")
def verifiers() -> Iterator[Verifiers]:
    if (problem := sandbox_problem()) is not None:
        pytest.skip(problem)
    short = {"timeout_s": 30.0}
    specs = {
        "tests": spec("python_tests", **short),
        "quick": spec("python_tests", timeout_s=0.3),
        "setup": spec("python_tests", setup_field="imports", **short),
        "humaneval": spec("humaneval", **short),
        "combined": spec(
            "combined",
            of=[{"verifier": spec("humaneval", **short)}, {"verifier": spec("regex", pattern="def")}],
        ),
    }
    with Verifiers(specs, (), 1) as verifiers:
        yield verifiers


def rewards(verifiers: Verifiers, source: str, reference: Any, *responses: str) -> list[float | None]:
    text = reference if isinstance(reference, str) else json.dumps(reference)
    grades = verifiers.verify([Submission(source, r, text) for r in responses], lambda _: None)
    assert [grade.failure for grade in grades] == [None] * len(grades)
    return [grade.reward for grade in grades]


def block(program: str, language: str = "python") -> str:
    return f"Like this:\n```{language}\n{program}\n```\nIt works."


def test_python_tests(verifiers: Verifiers) -> None:
    responses = [
        "def f(x):\n    return 2 * x",
        block("def f(x): return 2 * x"),
        block("def f(x): return 3 * x") + block("def f(x): return x + x", "") + block("f(2)", "text"),
        block("def f(x): return x + 2"),
        block("def f(x): return x +"),
        "I cannot do that.",
    ]
    asserts = ["assert f(2) == 4", "assert f(0) == 0"]
    for tests in (asserts, "\n".join(asserts), "def test_f():\n    " + "\n    ".join(asserts)):
        assert rewards(verifiers, "tests", tests, *responses) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    calls = {"fn_name": "f", "inputs": [[2], [0]], "outputs": [4, 0]}
    assert rewards(verifiers, "tests", calls, *responses) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    setup = {"tests": "assert sqrt(f(8)) == 4", "setup": ["import math", "from math import sqrt"]}
    assert rewards(verifiers, "setup", setup, *responses[:2]) == [1.0, 1.0]


def test_standard_input_and_output(verifiers: Verifiers) -> None:
    pairs = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]}
    right = "a, b = map(int, input().split())\nprint(a + b)"
    programs = [
        right,
        block(f"if __name__ == '__main__':\n    {right.replace(chr(10), chr(10) + '    ')}\n    print()"),
        "print(3)",
        right + "\nraise SystemExit(1)",
        "import os\nos.write(1, b'3')\nos._exit(0)",
    ]
    assert rewards(verifiers, "tests", pairs, *programs) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_humaneval(verifiers: Verifiers) -> None:
    responses = [
        BODY,
        BODY + "\nThis sums the squares (I think).",
        block(CODE + BODY),
        block(BODY.rstrip()),
        block("def total(numbers):\n" + BODY),
        "    return sum(numbers)\n",
        "    import os\n    os._exit(0)\n",
        block("def check(candidate): pass\ndef total(numbers): return 0"),
        "",
    ]
    assert rewards(verifiers, "humaneval", TASK, *responses) == [1.0] * 5 + [0.0] * 4
    bare = json.dumps({"code": "def total(numbers):\n", "test": TEST, "entry_point": "total"})
    assert rewards(verifiers, "humaneval", bare, BODY, "    return 5\n") == [1.0, 0.0]
    assert rewards(verifiers, "combined", [TASK, None], *responses[:3], "") == [0.5, 0.5, 1.0, 0.0]


def test_a_program_that_does_not_end_is_incorrect_and_costs_only_itself(verifiers: Verifiers) -> None:
    tests = "assert f() == 1"
    programs = ["def f():\n    while True: pass", "def f(): return 1"]
    assert rewards(verifiers, "quick", tests, programs[0]) == [0.0]
    assert rewards(verifiers, "tests", tests, programs[1]) == [1.0]


def test_programs_of_responses() -> None:
    assert program_of("x = 1") == "x = 1"
    assert program_of(block("x = 1")) == "\nx = 1\n"
    assert program_of(block("x = 1") + block("f(1)", "bash")) == "\nx = 1\n"
    assert program_of("```python\nx = 1") == "x = 1"
    assert program_of("```python\nx = 1", truncated=True) is None
    assert completed(CODE, "total", "```python\nx = 1", truncated=True) is None


@pytest.mark.parametrize(
    ("kind", "reference", "problem"),
    [
        ("python_tests", "assert f(1 == 2", "the tests are not Python: '(' was never closed (line 1)"),
        ("python_tests", "f(1)", "the tests 'f(1)' assert nothing, so every program passes"),
        ("python_tests", "[]", "the tests '' assert nothing, so every program passes"),
        ("python_tests", "[1, 2]", "tests must be text, a list of statements, or an object with inputs and outputs"),
        ("python_tests", '{"inputs": ["1"], "outputs": []}', "inputs and outputs must be lists of the same length"),
        ("python_tests", '{"inputs": [], "outputs": []}', "there are no inputs and outputs, so every program passes"),
        ("python_tests", '{"inputs": [[1]], "outputs": [1]}', "inputs and outputs must be texts; for a function's arguments, add fn_name"),
        ("humaneval", {"code": "def f(:", "test": TEST, "entry_point": "f"}, "the field 'prompt' is not Python: invalid syntax (line 1)"),
        ("humaneval", {"code": CODE, "test": "assert total([]) == 0", "entry_point": "total"}, "the field 'test' holds no tests: it defines no function check"),
        ("humaneval", {"code": CODE, "test": TEST, "entry_point": "sum_all"}, "the code does not define 'sum_all'"),
        ("humaneval", {"code": CODE, "test": TEST, "entry_point": 3}, "3 is not the name of a function, or code and test are not text"),
        ("python_tests", "assert f(1) == 2", None),
        ("python_tests", "import unittest\nclass T(unittest.TestCase):\n  def test(self): self.assertTrue(f())", None),
        ("humaneval", TASK, None),
    ],
)  # fmt: skip
def test_references_that_are_no_tests(kind: str, reference: Any, problem: str | None) -> None:
    text = reference if isinstance(reference, str) else json.dumps(reference)
    assert reference_problem(spec(kind), text) == problem


def test_a_machine_that_cannot_isolate_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """At check and at run time, with the reason of each mechanism and the remedy; nothing runs unprotected."""
    monkeypatch.setattr(Sandbox, "_launch", lambda self, mechanism: f"no {mechanism} in this test")
    sandbox_problem.cache_clear()
    try:
        problem = sandbox_problem()
    finally:
        sandbox_problem.cache_clear()
    assert problem is not None
    assert problem.startswith(
        "programs cannot be isolated here (namespaces: no namespaces in this test; landlock: no landlock in this"
    )
    assert "run on Linux with unprivileged user namespaces" in problem
    for kind in ("python_tests", "humaneval"):
        with pytest.raises(VerifierError, match="programs cannot be isolated here"):
            build_verifier(spec(kind), ())
