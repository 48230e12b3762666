"""Run a program, or tests of a program, in a process that the server has forked and isolated.

Tests and program are two processes. The program's never sees the tests' text or expected values, and has no
descriptor of the result; see `remote`. Standard library only.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import importlib
import inspect
import json
import os
import sys
import threading
import traceback
import types
import unittest
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from mergeopd.sandbox.remote import PROGRAM_OPERATIONS, TEST_OPERATIONS, Peer, Proxy

_MAX_REASON = 300
# Their classes and functions are the tests' own where tests use them through an import of the program.
_COMMON = (
    "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools", "json",
    "math", "re", "statistics", "string", "typing",
)  # fmt: skip


def run_script(descriptors: Mapping[str, int]) -> int:
    """Run a program as `python program.py` would and return its exit code."""
    module = _module("__main__")
    code = 1
    try:
        exec(compile(read_text(descriptors["program"]), "program.py", "exec"), module.__dict__)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    for finish in (threading._shutdown, atexit._run_exitfuncs, sys.stdout.flush):  # type: ignore[attr-defined]
        try:
            finish()
        except BaseException:  # noqa: BLE001
            code = code or 1
    return code & 0xFF


def serve_program(descriptors: Mapping[str, int]) -> int:
    """Run a program, then let the tests use what it defines until they end."""
    peer = Peer(descriptors["peer"], operations=PROGRAM_OPERATIONS)
    module = _module("solution")
    try:
        exec(compile(read_text(descriptors["program"]), "solution.py", "exec"), module.__dict__)
    except BaseException as error:  # noqa: BLE001
        peer.send({"failed": _described(error)})
        return 1
    peer.send({"failed": None})
    while True:
        try:
            message = peer.receive()
        except ConnectionError:
            return 0
        if "names" in message:
            values = {name: module.__dict__[name] for name in message["names"] if name in module.__dict__}
            peer.send({"names": {name: _offered(peer, value) for name, value in values.items()}})
        else:
            peer.answer(message)


def _offered(peer: Peer, value: Any) -> Any:
    """Describe a global name: a module, an object of the standard library, an exception, or a value."""
    if isinstance(value, types.ModuleType):
        return {"module": value.__name__}
    origin, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if origin in _COMMON and isinstance(name, str) and getattr(sys.modules.get(origin), name, None) is value:
        return {"library": [origin, name]}
    if isinstance(value, type) and issubclass(value, Exception):
        return {"exception": [kind.__name__ for kind in value.__mro__], "value": peer.encode(value)}
    return {"value": peer.encode(value)}


class _TestPeer(Peer):
    """The tests' end of the connection. Ends the process if the program's process ends."""

    def __init__(self, descriptor: int, lost: Callable[[], NoReturn]) -> None:
        super().__init__(descriptor, operations=TEST_OPERATIONS)
        self._lost = lost

    def send(self, message: dict[str, Any]) -> None:
        try:
            super().send(message)
        except OSError:
            self._lost()

    def receive(self) -> dict[str, Any]:
        try:
            return super().receive()
        except OSError:
            self._lost()


def run_tests(descriptors: Mapping[str, int]) -> int:
    """Run tests of the program at the other end of `peer`; write whether they passed."""

    def finish(passed: bool, reason: str = "") -> NoReturn:
        data = json.dumps({"passed": passed, "reason": reason[:_MAX_REASON]}).encode()
        os.write(descriptors["result"], data)
        os._exit(0)

    tests = json.loads(read_text(descriptors["tests"]))
    peer = _TestPeer(descriptors["peer"], lambda: finish(False, "the program ended its process"))
    failed = peer.receive()["failed"]
    if failed is not None:
        finish(False, f"the program raised {failed}")
    module = _module("tests")
    try:
        exec(compile(tests["setup"], "setup.py", "exec"), module.__dict__)
        for name in tests["program_names"]:
            module.__dict__.pop(name, None)
        tree = ast.parse(tests["tests"], "tests.py")
        module.__dict__.update(_names(peer, tree, {*module.__dict__, *vars(builtins)}))
        program = _module("solution")
        program.__getattr__ = lambda name: _imported(peer, name)  # type: ignore[method-assign]
        exec(compile(tree, "tests.py", "exec"), module.__dict__)
        _run_collected(module, _called(tree))
    except SystemExit as end:
        finish(not end.code, "the tests exited")
    except BaseException as error:  # noqa: BLE001
        finish(False, _described(error))
    finish(True)


def _names(peer: _TestPeer, tree: ast.AST, defined: set[str]) -> dict[str, Any]:
    """Return the values of the names that tests use and the program defines.

    Tests keep modules of the standard library and built-in functions, which a program could replace to pass.
    It may define a name such as `sum` if the tests use nothing else of it.
    """
    nodes = list(ast.walk(tree))
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    owners = {
        node.value.id
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    modules = (used & owners & sys.stdlib_module_names) - defined
    values: dict[str, Any] = {name: importlib.import_module(name) for name in modules}
    values |= _ask_program(peer, used - defined - modules)
    imports = any(isinstance(node, ast.ImportFrom) and node.module == "solution" for node in nodes)
    if not imports and not any(isinstance(value, Proxy | type) for value in values.values()):
        values |= _ask_program(peer, _called(tree) & vars(builtins).keys())
    return values


def _called(tree: ast.AST) -> set[str]:
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {function.id for function in calls if isinstance(function, ast.Name)}


def _ask_program(peer: _TestPeer, names: set[str]) -> dict[str, Any]:
    """Return the program's globals of these names, as far as it has them."""
    peer.send({"names": sorted(names)})
    values: dict[str, Any] = {}
    for name, offer in peer.receive()["names"].items():
        if name not in names:
            continue
        if "module" in offer and offer["module"].partition(".")[0] in sys.stdlib_module_names:
            values[name] = importlib.import_module(offer["module"])
        elif "library" in offer and offer["library"][0] in _COMMON:
            values[name] = getattr(importlib.import_module(offer["library"][0]), offer["library"][1])
        elif "exception" in offer:
            bases = (getattr(builtins, kind, None) for kind in offer["exception"][1:])
            base = next(b for b in bases if isinstance(b, type) and issubclass(b, Exception))
            values[name] = peer.exceptions[offer["exception"][0]] = type(name, (base,), {})
        elif "value" in offer:
            values[name] = peer.decode(offer["value"])
    return values


def _imported(peer: _TestPeer, name: str) -> Any:
    """Return what `from solution import NAME` binds."""
    values = {} if name.startswith("__") else _ask_program(peer, {name})
    if name not in values:
        raise AttributeError(f"the program does not define {name!r}")
    return values[name]


def _run_collected(module: types.ModuleType, called: set[str]) -> None:
    """Run what pytest and unittest would collect, unless the tests call it themselves."""
    for name, value in list(vars(module).items()):
        if name.startswith("test") and inspect.isfunction(value) and name not in called:
            value()
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromModule(module).run(result)
    for _, text in (*result.failures, *result.errors):
        raise AssertionError(text.strip().splitlines()[-1])


def _module(name: str) -> types.ModuleType:
    """Return a new module that can be imported by its name."""
    sys.modules[name] = module = types.ModuleType(name)
    module.__dict__["__builtins__"] = builtins
    return module


def read_text(descriptor: int) -> str:
    """Read a file to its end and close it."""
    with open(descriptor, encoding="utf-8") as file:
        return file.read()


def _described(error: BaseException) -> str:
    """Describe an exception in a line, with the line of the tests."""
    frames = traceback.extract_tb(error.__traceback__)
    line = next(
        (f" in line {frame.lineno}" for frame in reversed(frames) if frame.filename == "tests.py"), ""
    )
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001
        text = ""
    return f"{type(error).__name__}{line}" + (f": {text}" if text else "")
