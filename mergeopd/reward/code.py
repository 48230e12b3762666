"""Verifiers that run generated programs, in the sandbox."""

from __future__ import annotations

import ast
import functools
import json
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from mergeopd.errors import SandboxError, VerifierError
from mergeopd.recipe.verifiers import HumanEvalVerifier, PythonTestsVerifier
from mergeopd.reward.protocol import Verify, fenced_blocks, reference_values, required, short
from mergeopd.sandbox.client import Limits, Sandbox, UnitTests
from mergeopd.strict_json import parse_json

_PYTHON = ("python", "py", "python3")
_OPEN_FENCE = re.compile(r"^[ \t]*```[ \t]*(?:python3?|py)?[ \t]*\n", re.MULTILINE)
_CHECKED = (ast.Assert, ast.Raise)
_Pairs = tuple[tuple[str, str], ...]


@functools.cache
def _sandbox() -> Sandbox:
    """The sandbox of this worker process, which all of its verifiers share."""
    box = Sandbox()
    try:
        box.start()
    except SandboxError as error:
        raise VerifierError(str(error)) from error
    return box


def build_python_tests(spec: PythonTestsVerifier, allow_code: Collection[str]) -> Verify:
    sandbox = _sandbox()
    limits = Limits(timeout_s=spec.timeout_s, memory_mb=spec.memory_mb)

    def verify(response: str, reference: str | None, /, *, truncated: bool = False) -> float:
        tests = _tests(spec, required(spec.kind, reference))
        program = program_of(response, truncated)
        if program is None:
            return 0.0
        try:
            if isinstance(tests, UnitTests):
                return float(sandbox.test(program, tests, limits).passed)
            return float(_has_output(sandbox, program, tests, limits))
        except SandboxError as error:
            raise VerifierError(str(error)) from error

    return verify


def _has_output(sandbox: Sandbox, program: str, pairs: _Pairs, limits: Limits) -> bool:
    """Whether a program writes the expected output for every input; the time limit is for all."""
    deadline = time.monotonic() + limits.timeout_s
    for given, expected in pairs:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        outcome = sandbox.run(program, given, replace(limits, timeout_s=left))
        if outcome.exit_code != 0 or _lines(outcome.stdout) != _lines(expected):
            return False
    return True


def _lines(text: str) -> list[list[str]]:
    """Split into lines of words, without blank lines at the end."""
    return [line.split() for line in text.rstrip().splitlines()]


def build_humaneval(spec: HumanEvalVerifier, allow_code: Collection[str]) -> Verify:
    sandbox = _sandbox()
    limits = Limits(timeout_s=spec.timeout_s, memory_mb=spec.memory_mb)

    def verify(response: str, reference: str | None, /, *, truncated: bool = False) -> float:
        code, test, entry_point = _task(reference_values(spec.kind, reference))
        program = completed(code, entry_point, response, truncated)
        tests = UnitTests(f"{test}\n\ncheck({entry_point})\n", _as_module(code), (entry_point,))
        try:
            return float(program is not None and sandbox.test(program, tests, limits).passed)
        except SandboxError as error:
            raise VerifierError(str(error)) from error

    return verify


# --------------------------------------------------------------------------------------------- programs


def program_of(response: str, truncated: bool = False) -> str | None:
    """Return the last fenced block of Python, or the whole response without one; None if it was cut off."""
    blocks = fenced_blocks(response)
    for accepted in (_PYTHON, ("",)):
        for language, content in reversed(blocks):
            if language in accepted:
                return content
    if (opening := _OPEN_FENCE.search(response)) is not None and not blocks:
        return None if truncated else response[opening.end() :]
    return response


def completed(code: str, entry_point: str, response: str, truncated: bool = False) -> str | None:
    """Return a program from code and a response that continues it or defines the function again."""
    block = program_of(response, truncated)
    if block is None:
        return None
    if _defines(block, entry_point):
        return f"{code}\n\n{block}"
    body = block.lstrip("\n") if block != response else block
    program = code + body
    if _parses(program):
        return program
    # A continuation may be followed by other text, which begins at the margin.
    rest = re.search(r"^\S", body, re.MULTILINE)
    return program if rest is None else code + body[: rest.start()]


def _defines(program: str, name: str) -> bool:
    try:
        body = ast.parse(program).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name for node in body)


def _parses(program: str) -> bool:
    return _syntax_problem(program) is None


def _syntax_problem(program: str) -> str | None:
    try:
        ast.parse(program)
    except SyntaxError as error:
        return f"{error.msg} (line {error.lineno})"
    except (ValueError, RecursionError, MemoryError) as error:
        return str(error) or type(error).__name__
    return None


# ------------------------------------------------------------------------------------------- references


def python_tests_problem(spec: PythonTestsVerifier, reference: str) -> str | None:
    """Return why a reference holds no tests."""
    try:
        tests = _tests(spec, reference)
    except VerifierError as error:
        return str(error)
    if not isinstance(tests, UnitTests):
        return None
    if (problem := _syntax_problem(tests.setup)) is not None:
        return f"the field {spec.setup_field!r} is not Python: {problem}"
    return _tests_problem(tests.tests)


def humaneval_problem(spec: HumanEvalVerifier, reference: str) -> str | None:
    """Return why a task has no tests."""
    try:
        code, test, entry_point = _task(reference_values(spec.kind, reference))
    except VerifierError as error:
        return str(error)
    if (problem := _syntax_problem(_as_module(code))) is not None:
        return f"the field {spec.code_field!r} is not Python: {problem}"
    if not _defines(test, "check"):
        problem = _syntax_problem(test) or "it defines no function check"
        return f"the field {spec.test_field!r} holds no tests: {problem}"
    return None if _defines(_as_module(code), entry_point) else f"the code does not define {entry_point!r}"


def _as_module(code: str) -> str:
    """Complete code that ends with the head of a function, which has no docstring."""
    return code if _parses(code) else f"{code.rstrip()}\n    pass\n"


def _tests_problem(tests: str) -> str | None:
    if (problem := _syntax_problem(tests)) is not None:
        return f"the tests are not Python: {problem}"
    nodes = list(ast.walk(ast.parse(tests)))
    methods = (
        node.func.attr
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    )
    if not any(isinstance(node, _CHECKED) for node in nodes) and not any(
        name.startswith(("assert", "fail")) for name in methods
    ):
        return f"the tests {short(tests)} assert nothing, so every program passes"
    return None


def _tests(spec: PythonTestsVerifier, reference: str) -> UnitTests | _Pairs:
    """Read the tests of a reference. Raises VerifierError."""
    tests: Any = reference
    setup: Any = ""
    if spec.setup_field is not None:
        values = reference_values(spec.kind, reference)
        tests, setup = values["tests"], values["setup"]
    if isinstance(tests, str):
        try:
            tests = parse_json(tests, float)
        except (ValueError, RecursionError):
            return UnitTests(tests, _statements(setup))
    if isinstance(tests, dict) and {"inputs", "outputs"} <= tests.keys():
        return _examples(tests, _statements(setup))
    return UnitTests(_statements(tests), _statements(setup))


def _statements(value: Any) -> str:
    lines = [value] if isinstance(value, str) else value
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise VerifierError("tests must be text, a list of statements, or an object with inputs and outputs")
    return "\n".join(lines)


def _examples(tests: Mapping[str, Any], setup: str) -> UnitTests | _Pairs:
    """Read inputs and outputs: texts of standard input and output, or arguments and values of `fn_name`."""
    inputs, outputs, name = tests["inputs"], tests["outputs"], tests.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise VerifierError("inputs and outputs must be lists of the same length")
    if not inputs:
        raise VerifierError("there are no inputs and outputs, so every program passes")
    if name is None:
        if not all(isinstance(text, str) for text in (*inputs, *outputs)):
            raise VerifierError("inputs and outputs must be texts; for a function's arguments, add fn_name")
        return tuple(zip(inputs, outputs, strict=True))
    if not isinstance(name, str) or not name.isidentifier() or not all(isinstance(i, list) for i in inputs):
        raise VerifierError("fn_name must be a function's name, and each of the inputs a list of arguments")
    pairs = zip(inputs, outputs, strict=True)
    return UnitTests("\n".join(f"assert {name}(*{given!r}) == {output!r}" for given, output in pairs), setup)


def _task(values: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return code, test and entry point of a row. Raises VerifierError."""
    task = values["code"], values["test"], values["entry_point"]
    if not all(isinstance(text, str) for text in task) or not task[2].isidentifier():
        raise VerifierError(
            f"{json.dumps(task[2])} is not the name of a function, or code and test are not text"
        )
    return task
