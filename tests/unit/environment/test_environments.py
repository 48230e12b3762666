"""Environments alone, and in their processes: built-in tools, Python classes, servers, hangs and crashes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from mergeopd.environment.calculator import calculate
from mergeopd.environment.functions import function_schema
from mergeopd.environment.pool import EnvironmentPool, Request
from mergeopd.errors import EnvironmentFailed
from mergeopd.recipe.environments import Environment

MODULE = '''
import os, time

def weather(city: str, days: int = 1) -> dict:
    """Look up the weather.

    Args:
        city: name of a city
        days: how far ahead

    Returns:
        The forecast.
    """
    if city == "nowhere":
        raise KeyError("no such city")
    return {"city": city, "days": days}

def untyped(a):
    return a

class Counter:
    """Adds up; hangs at 13, ends its process at 14."""

    def reset(self, row):
        from mergeopd.environment.protocol import Opening
        self.total = int(row["reference"] or 0)
        return Opening([{"role": "user", "content": f"start at {self.total}"}], [])

    def step(self, tool_calls, content):
        from mergeopd.environment.protocol import Step
        for call in tool_calls:
            self.total += call.arguments["by"]
        if self.total == 13:
            time.sleep(60)
        if self.total == 14:
            os._exit(0)
        if self.total == 15:
            return Step(reward=float("nan"))
        if not tool_calls:
            return Step(done=True, reward=self.total / 100)
        return Step([{"role": "tool", "content": str(self.total)}])
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_tools.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_tools"


def pool(spec: dict[str, Any], *code: str, workers: int = 1) -> EnvironmentPool:
    return EnvironmentPool({"s": TypeAdapter(Environment).validate_python(spec)}, code, workers)


def reset(episode: int, reference: str | None = None) -> Request:
    row = {"key": "s:0", "domain": "d", "messages": [], "reference": reference, "tools": []}
    return Request(episode, "s", {"op": "reset", "source": "s", "row": row})


def call(episode: int, name: str, content: str = "", **arguments: Any) -> Request:
    calls = [{"name": name, "arguments": arguments, "id": "c1"}] if name else []
    return Request(episode, "s", {"op": "step", "calls": calls, "content": content})


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 + 3 * 4", 14),
        ("(17 + 4) * 2 / 7", 6),
        ("2^10 - 1", 1023),
        ("-7 // 2", -4),
        ("10 ** 20 + 1", 10**20 + 1),
        ("1 / 3", 1 / 3),
        ("0.1 + 0.2", 0.3),
    ],
)
def test_the_calculator_is_exact(expression: str, value: float) -> None:
    assert float(calculate(expression)) == pytest.approx(value, rel=1e-11)
    if isinstance(value, int):
        assert calculate(expression) == str(value)


@pytest.mark.parametrize(
    "expression",
    ["", "9 ** 9 ** 9", "__import__('os')", "(lambda: 1)()", "'a' * 3", "1 / 0", "(" * 5000, "True + 1"],
)
def test_the_calculator_refuses(expression: str) -> None:
    with pytest.raises((ValueError, ZeroDivisionError)):
        calculate(expression)


def test_schemas_of_functions_equal_those_of_transformers(module: str) -> None:
    import importlib

    from transformers.utils import get_json_schema

    function = importlib.import_module(module).weather
    own, reference = function_schema("weather", function), get_json_schema(function)["function"]
    assert own["function"]["name"] == reference["name"]
    assert own["function"]["description"] == reference["description"]
    parameters, expected = own["function"]["parameters"], reference["parameters"]
    assert parameters["required"] == expected["required"]
    for name, value in expected["properties"].items():
        for key in ("type", "description"):
            assert parameters["properties"][name][key] == value[key]


def test_functions_get_typed_arguments_and_errors_are_replies(module: str) -> None:
    functions = [f"{module}:weather"]
    served = pool({"kind": "functions", "functions": functions}, *functions)
    opening, *steps = served.run(
        [
            reset(0),
            call(0, "weather", city="Bern", days=2),
            call(0, "weather", city="nowhere"),
            call(0, "weather", town="Bern"),
            call(0, "wether", city="Bern"),
        ]
    )
    served.close()
    assert opening["messages"] == []
    assert [tool["function"]["name"] for tool in opening["tools"]] == ["weather"]
    replies = [step["messages"][0] for step in steps]
    assert {**replies[0]} == {
        "role": "tool",
        "name": "weather",
        "tool_call_id": "c1",
        "content": '{"city": "Bern", "days": 2}',
    }
    assert [step["num_failed"] for step in steps] == [0, 1, 1, 1]
    assert "no such city" in replies[1]["content"]
    assert "town" in replies[2]["content"]
    assert replies[3]["content"] == "Error: unknown tool 'wether'; tools are weather"


@pytest.mark.parametrize(
    ("function", "allowed", "message"),
    [
        ("weather", False, "is not allowed; add it to allow_code"),
        ("missing", True, "has no function or class 'missing'"),
        ("untyped", True, "parameter 'a' of tool 'untyped' needs a type hint"),
    ],
)
def test_functions_that_cannot_be_tools(module: str, function: str, allowed: bool, message: str) -> None:
    path = f"{module}:{function}"
    served = pool({"kind": "functions", "functions": [path]}, *([path] if allowed else []))
    with pytest.raises(EnvironmentFailed, match=message):
        served.run([reset(0)])


def test_search_ranks_documents(tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    documents = ["the cat sat on the mat", "a dog barked at the cat", "stars shine at night"]
    lines = [json.dumps({"text": text, "title": f"T{i}"}) for i, text in enumerate(documents)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    served = pool({"kind": "search", "corpus": str(tmp_path / "corpus.jsonl"), "num_results": 2})
    _, dog, nothing = served.run(
        [reset(0), call(0, "search", query="barked dog"), call(0, "search", query="zebra")]
    )
    served.close()
    assert dog["messages"][0]["content"].startswith("T1\na dog barked at the cat")
    assert nothing["messages"][0]["content"] == "nothing was found"


def test_episodes_keep_their_state_when_another_hangs_or_ends_the_process(module: str) -> None:
    path = f"{module}:Counter"
    served = pool({"kind": "user", "environment": path, "timeout_s": 1.0}, path)
    openings = served.run([reset(0, "1"), reset(1, "11"), reset(2, "7"), reset(3, "9")])
    assert [one["messages"][0]["content"] for one in openings[:2]] == ["start at 1", "start at 11"]
    first = served.run([call(i, "add", by=1) for i in range(4)])
    assert [one["messages"][0]["content"] for one in first] == ["2", "12", "8", "10"]
    hung, ended, kept, not_a_number = served.run(
        [call(1, "add", by=1), call(2, "add", by=6), call(0, "add", by=1), call(3, "add", by=5)]
    )
    assert hung == {"failure": "the environment took more than 1 s (timeout_s)"}
    assert ended == {"failure": "the environment ended its process"}
    assert kept["messages"][0]["content"] == "3"
    assert "reward is nan" in not_a_number["failure"]
    (last,) = served.run([call(0, "")])
    served.close()
    assert (last["done"], last["reward"]) == (True, 0.03)


def test_a_stop_ends_waiting_at_once(module: str) -> None:
    """While one environment hangs for a minute and others wait, a request to stop ends all."""
    path = f"{module}:Counter"
    served = pool({"kind": "user", "environment": path, "timeout_s": 60.0}, path)
    served.run([reset(0, "12"), reset(1, "1"), reset(2, "1")])

    class StopError(Exception):
        pass

    def stop(num_done: int) -> None:
        raise StopError

    started = time.monotonic()
    with pytest.raises(StopError):
        served.run([call(0, "add", by=1), call(1, "add", by=1), call(2, "add", by=1)], stop)
    assert time.monotonic() - started < 30
    (opening,) = served.run([reset(3, "5")])
    served.close()
    assert opening["messages"][0]["content"] == "start at 5"


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            replies = {
                "/reset": lambda: {"session": content["row"]["reference"], "tools": []},
                "/step": lambda: {
                    "messages": [{"role": "tool", "content": f"{content['session']}: {content['content']}"}],
                    "reward": 0.5,
                },
            }
            body = json.dumps(replies[self.path]()).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


def test_a_server_is_an_environment(server: str) -> None:
    served = pool({"kind": "http", "url": server})
    _, step = served.run([reset(0, "red"), call(0, "look", content="hm", at="x")])
    served.close()
    assert (step["messages"], step["reward"]) == ([{"role": "tool", "content": "red: hm"}], 0.5)


def test_a_server_that_is_not_there_is_a_failure() -> None:
    served = pool({"kind": "http", "url": "http://127.0.0.1:9"})
    (opening,) = served.run([reset(0)])
    served.close()
    assert opening["failure"].startswith("http://127.0.0.1:9/reset: ")
