"""Tests of programs in another process: what passes, and programs that try to pass without solving."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mergeopd.errors import SandboxError
from mergeopd.sandbox.client import Limits, Sandbox, UnitTests

LIMITS = Limits(timeout_s=30.0)
SQUARE = UnitTests("assert square(3) == 9\nassert square(-2) == 4\nassert abs(square(0.5) - 0.25) < 1e-9")
TOUCH = "import os, sys, gc, ctypes, inspect\n"
HONEST = "def square(x):\n    return x * x\n"

FORGERIES = {
    "exit before the tests": "import os\nos._exit(0)",
    "exit by exception": "raise SystemExit(0)",
    "exit in the function": f"{TOUCH}def square(x):\n    os._exit(0)",
    "raise in the function": "def square(x):\n    raise SystemExit(0)",
    "claim success": f"{TOUCH}def square(x):\n    print('passed')\n    os._exit(0)",
    "write to every descriptor": f"""{TOUCH}
for number in range(64):
    try: os.write(number, b'{{"passed": true, "reason": ""}}')
    except OSError: pass
def square(x): return 0""",
    "a message instead of a value": f"""{TOUCH}
import json, struct
def square(x):
    body = json.dumps({{"value": True, "passed": True}}).encode()
    for number in range(3, 64):
        try: os.write(number, struct.pack("=I", len(body)) + body)
        except OSError: pass
    os._exit(0)""",
    "close all descriptors": f"{TOUCH}os.closerange(0, 1000)\ndef square(x): return 0",
    "equal to everything": """
class Everything:
    def __eq__(self, other): return True
    def __sub__(self, other): return 0.0
    __rsub__ = __sub__
    def __abs__(self): return self
    def __lt__(self, other): return True
def square(x): return Everything()""",
    "an integer equal to everything": """
class Number(int):
    def __eq__(self, other): return True
    def __sub__(self, other): return 0
def square(x): return Number(1)""",
    "learn the expected value": """
class Spy:
    def __rsub__(self, other): return 0
    def __sub__(self, other): return 0
    def __eq__(self, other): global seen; seen = other; return True
def square(x): return Spy()""",
    "replace built-in functions": "abs = lambda x: 0\ndef square(x): return 0",
    "replace them for all": "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.AssertionError = None\ndef square(x): return 0",
    "look into the callers": f"""{TOUCH}
def square(x):
    for frame in inspect.stack():
        for value in (*frame.frame.f_locals.values(), *frame.frame.f_globals.values()):
            if isinstance(value, dict) and 'passed' in value: value['passed'] = True
    return 0""",
    "search the memory for the tests": f"""{TOUCH}
def square(x):
    texts = [o for o in gc.get_objects() if isinstance(o, (dict, list)) and 'assert square' in str(o)[:10**6]]
    memory = ctypes.string_at(id(0), 0)
    return 9 if texts else 0""",
    "at exit": "import atexit, os\natexit.register(os._exit, 0)\ndef square(x): return 0",
    "an exception that passes": "def square(x):\n    raise StopIteration",
    "other tests": "import sys, types\nsys.modules['tests'] = types.ModuleType('tests')\ndef square(x): return 0",
    "not Python": "def square(x) return x * x",
    "nothing": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    box = Sandbox()
    try:
        box.start()
    except SandboxError as error:
        pytest.skip(str(error))
    with box:
        yield box


@pytest.mark.parametrize("name", FORGERIES)
def test_a_program_that_solves_nothing_fails(sandbox: Sandbox, name: str) -> None:
    outcome = sandbox.test(FORGERIES[name], SQUARE, LIMITS)
    assert not outcome.passed
    assert outcome.reason


@pytest.mark.parametrize("forgery", ["gcd = math = None", "class math:\n    isclose = lambda *a: True"])
def test_tests_keep_the_modules_that_they_use(sandbox: Sandbox, forgery: str) -> None:
    program = f"{forgery}\ndef square(x): return 0"
    assert not sandbox.test(program, UnitTests("assert math.isclose(square(3), 9)"), LIMITS).passed


HONEST_PROGRAMS = {
    "changes its argument": ("def f(x): x.sort()", "a = [2, 1]\nf(a)\nassert a == [1, 2]"),
    "calls the test's function": ("def f(g, x): return g(g(x))", "assert f(lambda x: x + 1, 3) == 5"),
    "a generator": ("def f():\n  yield 1\n  yield (2, {3})", "assert list(f()) == [1, (2, {3})]"),
    "values of many types": (
        "from fractions import Fraction\nfrom collections import namedtuple\nP = namedtuple('P', 'x y')\n"
        "def f(): return [None, True, 2**90, 0.5, 'é', b'a', {1: {2}}, (1,), 1j, Fraction(1, 3), P(1, [2])]",
        "v = f()\nassert v[:8] == [None, True, 2**90, 0.5, 'é', b'a', {1: {2}}, (1,)]\n"
        "assert v[8] == 1j and 3 * v[9] == 1 and v[10].y == [2] and v[10] == (1, [2])",
    ),
    "a class": (
        "class Stack:\n  def __init__(self, *v): self.v = [*v]\n  def push(self, x): self.v.append(x)\n"
        "  def __len__(self): return len(self.v)\n  def __iter__(self): return iter(self.v)\n"
        "  def __eq__(self, other): return self.v == other.v\n  def __getitem__(self, i): return self.v[i]",
        "s = Stack()\ns.push(3)\nassert isinstance(s, Stack) and len(s) == 1 and s[0] == 3 and s.v == [3]\n"
        "assert list(s) == [3] and s == Stack(3) and s != Stack(4) and 3 in s and not isinstance(3, Stack)",
    ),
    "an exception of its own": (
        "class Bad(ValueError): pass\ndef f(): raise Bad('no')",
        "try:\n  f()\n  assert False\nexcept Bad as error:\n  assert str(error) == 'no'",
    ),
    "the name of a built-in function": ("def sum(a, b): return a + b", "assert sum(10, 15) == 25"),
    "names of its imports": (
        "import math\nfrom collections import Counter\ndef f(x): return x",
        "assert Counter(f('aa')) == Counter('aa') and math.isclose(f(1), 1)",
    ),
    "functions as pytest collects them": ("def f(): return 1", "def test_f():\n  assert f() == 1"),
    "a test case": (
        "def f(): return 1",
        "import unittest\nclass T(unittest.TestCase):\n  def test_f(self): self.assertEqual(f(), 1)",
    ),
    "imported by the tests": ("def f(): return 1", "from solution import f\nassert f() == 1"),
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "def f():\n  with ThreadPoolExecutor(4) as pool: return list(pool.map(abs, [-1, -2]))",
        "assert f() == [1, 2]",
    ),
    "asyncio": (
        "import asyncio\nasync def g():\n  await asyncio.sleep(0)\n  return 4\ndef f(): return asyncio.run(g())",
        "assert f() == 4",
    ),
    "files in the scratch folder": (
        "import tempfile\ndef f(name):\n  with tempfile.TemporaryDirectory() as d, open(d + '/a', 'w') as file:\n"
        "    file.write('x')\n  return open(name).read()",
        "open('given', 'w').write('text')\nassert f('given') == 'text'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST_PROGRAMS)
def test_honest_programs_pass(sandbox: Sandbox, name: str) -> None:
    program, tests = HONEST_PROGRAMS[name]
    outcome = sandbox.test(program, UnitTests(tests), LIMITS)
    assert (outcome.passed, outcome.reason) == (True, "")
    # What the tests assert is evaluated: the same tests fail for a program that returns something else.
    wrong = "def f(*_): return 'wrong'\nsum = Stack = f\nclass Bad(ValueError): pass"
    assert not sandbox.test(wrong, UnitTests(tests), LIMITS).passed


def test_reasons(sandbox: Sandbox) -> None:
    def reason(program: str, tests: str = SQUARE.tests, limits: Limits = LIMITS) -> str:
        return sandbox.test(program, UnitTests(tests), limits).reason

    assert reason(HONEST) == ""
    assert reason("def square(x): return x + x") == "AssertionError in line 1"
    assert reason("def square(x): return 9") == "AssertionError in line 2"
    assert reason("def cube(x): return 9") == "NameError in line 1: name 'square' is not defined"
    assert reason("x = 1 +") == "the program raised SyntaxError: invalid syntax (solution.py, line 1)"
    assert reason("while True: pass", limits=Limits(timeout_s=0.3)) == "it took more than 0.3 s"
    assert reason("import os\nos._exit(0)") == "the program ended its process"
    assert reason(HONEST, "def test_1():\n  assert square(1) == 2") == "AssertionError in line 2"


def test_setup_runs_beside_the_tests_and_not_the_program(sandbox: Sandbox) -> None:
    setup = "def poly(x):\n    return x - 3\ndef zero():\n    '''Returns a zero of poly.'''\n"
    tests = UnitTests("assert poly(zero()) == 0", setup, ["zero"])
    assert sandbox.test("def zero(): return 3", tests, LIMITS).passed
    assert not sandbox.test("def zero(): return 4\ndef poly(x): return 0", tests, LIMITS).passed
    assert "'zero' is not defined" in sandbox.test("", tests, LIMITS).reason


def test_scripts(sandbox: Sandbox) -> None:
    program = "import sys\nname = input()\nprint('hello', name)\nsys.exit(len(sys.stdin.read()))"
    outcome = sandbox.run(program, "Ada\nxyz", LIMITS)
    assert (outcome.exit_code, outcome.stdout) == (3, "hello Ada\n")
    assert sandbox.run("import os\nos.abort()", "", LIMITS).exit_code == -6
    assert "ZeroDivisionError" in sandbox.run("1 / 0", "", LIMITS).stderr


def test_results_do_not_depend_on_earlier_programs(sandbox: Sandbox) -> None:
    program = "import random\nprint(random.random(), hash('a'), sorted({'a', 'b', 'c'}, key=hash))"
    first = sandbox.run(program, "", LIMITS)
    sandbox.run("import random, sys\nrandom.seed(5)\nsys.setrecursionlimit(50)", "", LIMITS)
    assert sandbox.run(program, "", LIMITS) == first
