"""Whole runs that learn the text of a chat API: requests, kills, measurement, cost, and no key in any file."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, Reply, completion
from rich.console import Console

from mergeopd.engine.run import evaluate_recipe, run_recipe
from mergeopd.errors import RecipeError, TeacherError
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.page.html import write_report

KEY = "sk-test-0123456789"
PHASE = {"name": "imitate", "text": "teacher", "updates": 2, "loss": "nll", "prompts_per_round": 4}


def api_card(folder: Path, url: str, **api: Any) -> None:
    settings = {"url": url, "model": "writer", "api_key_env": "WRITER_KEY", "concurrency": 1, **api}
    (folder / "writer.yaml").write_text(json.dumps({"card": 1, "name": "w", "api": settings}))


def job(write_job: Callable[..., Path], folder: Path, url: str, recipe: dict[str, Any], **api: Any) -> Path:
    """The usual job with its domains taught by an API."""
    api_card(folder, url, **api)
    sources = [{"source": f"{name}.jsonl", "domain": name, "teachers": "w"} for name in ("left", "right")]
    teachers = {"w": {"card": "writer.yaml"}}
    return write_job({"phases": [PHASE], "teachers": teachers, "prompts": sources, **recipe})


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WRITER_KEY", KEY)
    with ChatServer(lambda body, number: completion("c d")) as running:
        yield running


def everything_in(folder: Path) -> str:
    files = (file for file in folder.rglob("*") if file.is_file())
    return "\n".join(f"{file}\n{file.read_bytes().decode(errors='replace')}" for file in files)


def run_forked(recipe: Path) -> int:
    """Start a run in a process of its own; return its id."""
    if pid := os.fork():
        return pid
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        run_recipe(recipe, (), None, ())
    finally:
        os._exit(0)


def test_a_killed_run_asks_for_the_rest_only(
    write_job: Callable[..., Path], server: ChatServer, tmp_path: Path
) -> None:
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "d", "answer": "c d"}\n')
    suites = [{"source": "held_out.jsonl", "domain": "left", "verifier": "exact"}]
    evaluation = {"prompts": suites, "static_merges": []}
    prices = {"input": 1e5, "output": 0}
    recipe = job(write_job, tmp_path, server.url, {"evaluation": evaluation}, prices=prices)
    run_recipe(recipe, ("output=other", "text_cache=other-texts"), None, ())
    of_text = [body for body in server.bodies if body["temperature"] > 0]
    assert (len(of_text), len(server.bodies)) == (
        4,
        5,
    )  # the prompts of the phase once, and the expert's suite
    server.bodies.clear()
    started = list[int]()

    def kill(body: dict[str, Any], number: int) -> Reply:
        if number == 3:
            os.kill(started[0], signal.SIGKILL)
        return completion("c d")

    server.make_reply = kill
    started.append(run_forked(recipe))
    assert os.waitstatus_to_exitcode(os.waitpid(started[0], 0)[1]) == -signal.SIGKILL
    assert len(server.bodies) == 3
    run_recipe(recipe, (), None, ())
    # The third reply was not received, so it is asked for again, and the two before it are not.
    assert len(server.bodies) == 3 + 2 + 1
    weights = [(tmp_path / run / "export" / "model.safetensors").read_bytes() for run in ("other", "run")]
    assert weights[0] == weights[1]
    # The expert was measured, and all that the run used is counted over both of its processes.
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["suites"]["left"]["accuracy"]["expert/w"]["value"] == 1.0
    (use,) = result["api_use"]
    assert use == {"teacher": "w", "num_prompt": 50, "num_response": 25, "dollars": 5.0, "num_replies": 5}
    # Measuring the student alone asks for nothing, and knows the expert as far as its replies are kept.
    for cache, models in (("texts", {"merged", "expert/w"}), ("new-texts", {"merged"})):
        overrides = () if cache == "texts" else (f"text_cache={cache}",)
        again = evaluate_recipe(recipe, overrides, None, None, ("merged",), Console(quiet=True))
        assert again.suites["left"].accuracy.keys() - {"base"} == models
    assert len(server.bodies) == 6
    page, _ = write_report(tmp_path / "run")
    assert "5 responses, 50 tokens in and 25 out, $5.00" in page.read_text()
    model_card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "| teacher `w` | writer |" in model_card
    # The metrics have its text, and no operations for it: they are not known.
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    costs = [json.loads(line)["cost"] for line in lines]
    assert [cost["num_generated"] for cost in costs] == [{"teacher": 12}] * 2
    assert all(cost["flops"].keys() == {"update"} for cost in costs)
    assert KEY in os.environ["WRITER_KEY"]
    assert KEY not in everything_in(tmp_path)


def test_a_phase_keeps_correct_replies(
    write_job: Callable[..., Path], server: ChatServer, tmp_path: Path
) -> None:
    """Refusals and cut replies are no responses to learn from; others of the domain take their places."""
    replies = {
        "a b": completion("c"),
        "c": completion("c c c", "length"),
        "b": completion("", "content_filter"),
    }
    server.make_reply = lambda body, number: replies.get(body["messages"][-1]["content"], completion("c"))
    rows = [
        {"source": f"{name}.jsonl", "domain": name, "teachers": "w", "verifier": "exact"}
        for name in ("left", "right")
    ]
    recipe = job(write_job, tmp_path, server.url, {"phases": [{**PHASE, "keep": "right"}], "prompts": rows})
    run_recipe(recipe, (), None, ())
    graded = [
        json.loads(line) for line in (tmp_path / "run/rollouts/teacher_text.jsonl").read_text().splitlines()
    ]
    assert {(row["key"], row["truncated"], row["kept"]) for row in graded} == {
        ("left:0", False, True),
        ("left:1", True, False),
        ("right:0", False, True),
    }
    server.make_reply = lambda body, number: completion("", "content_filter")
    fresh = ("output=other", "text_cache=other-texts")
    with pytest.raises(TeacherError, match=r"none of the 4 responses of teacher 'w' can be used"):
        run_recipe(recipe, fresh, None, ())


def problems(recipe: Path) -> list[tuple[str, str, str]]:
    with pytest.raises(RecipeError) as caught:
        preflight(recipe)
    return [(problem.path, problem.message, problem.remedy) for problem in caught.value.problems]


def test_what_an_api_cannot_do_is_told_at_the_start(
    write_job: Callable[..., Path], server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = job(write_job, tmp_path, server.url, {"phases": [{**PHASE, "loss": "forward_kl"}]})
    assert problems(recipe) == [
        (
            "phases[0].loss",
            "the loss needs hidden states of teacher 'w', which provides no targets",
            "learn its text with `nll` alone, or give the other terms `teachers` of their own",
        )
    ]
    recipe = job(
        write_job, tmp_path, server.url, {"teachers": {"w": {"card": "writer.yaml", "dtype": "bfloat16"}}}
    )
    assert [found[0] for found in problems(recipe)] == ["teachers.w.dtype"]
    # A local teacher scores what the API writes.
    mixed = {
        "teachers": {"w": {"card": "writer.yaml"}, "two": {"card": "two.yaml"}},
        "phases": [{**PHASE, "loss": {"nll": 0.5, "forward_kl": {"weight": 1.0, "teachers": "two"}}}],
    }
    run_recipe(job(write_job, tmp_path, server.url, mixed), (), None, ())
    recipe = job(write_job, tmp_path, server.url, {})
    api = "teachers.w.card.api"
    server.models = ["writers", "other"]
    assert problems(recipe) == [
        (
            f"{api}.model",
            f"{server.url} has no model 'writer'",
            "did you mean 'writers'?; `probe: false` in the card leaves this check out",
        )
    ]
    for listed in (["models/writer"], None):
        server.models = listed
        told = f"teacher 'w' is behind an API: prompts and the key in WRITER_KEY are sent to {server.url}"
        assert told in preflight(recipe).notes
    monkeypatch.setenv("WRITER_KEY", f"{KEY} {KEY}")
    ((place, message, _),) = problems(recipe)
    assert (place, message) == (
        f"{api}.api_key_env",
        "environment variable 'WRITER_KEY' has characters that no key has",
    )
    monkeypatch.delenv("WRITER_KEY")
    assert problems(recipe) == [
        (
            f"{api}.api_key_env",
            "environment variable 'WRITER_KEY' is not set",
            "set it in the shell, as in `export WRITER_KEY=...`; it is not written to any file",
        )
    ]
    api_card(tmp_path, "http://127.0.0.1:9/v1", api_key_env=None)
    ((place, message, remedy),) = problems(recipe)
    assert (place, message.partition(" (")[0]) == (f"{api}.url", "http://127.0.0.1:9/v1: not reachable")
    assert "start the server" in remedy
    api_card(tmp_path, "http://127.0.0.1:9/v1", api_key_env=None, probe=False)
    preflight(recipe)


@pytest.mark.parametrize(
    ("api", "place", "cause"),
    [
        ({"api_key_env": "sk-secret-key"}, "api_key_env", "not the name of an environment variable"),
        ({"api_key_env": "abcdef0123456789"}, "api_key_env", "not the name of an environment variable"),
        ({"url": "https://user:pw@host/v1"}, "url", "not an address"),
        ({"url": "https://host/v1/chat/completions"}, "url", "not an address"),
        ({"url": "http://10.0.0.5/v1"}, "", "the key would be sent unencrypted to 10.0.0.5"),
        ({"url": "http://10.0.0.5/v1", "allow_http_to": "10.0.0.6"}, "", "the key would be sent unencrypted"),
        ({"extra": {"n": 4}}, "extra", "'n' is set by mergeopd: remove it"),
    ],
)
def test_cards_that_are_refused(
    write_job: Callable[..., Path], tmp_path: Path, api: dict[str, Any], place: str, cause: str
) -> None:
    recipe = job(write_job, tmp_path, "https://host/v1", {})
    api_card(tmp_path, **{"url": "https://host/v1", **api})
    ((path, message, remedy),) = problems(recipe)
    assert path == ".".join(filter(None, ("teachers.w.card.api", place)))
    assert message.startswith(cause)
    assert "sk-secret" not in message + remedy
    assert "abcdef" not in message + remedy


def test_a_host_of_ones_own_can_be_allowed(write_job: Callable[..., Path], tmp_path: Path) -> None:
    from mergeopd.recipe.resolve import read

    url = "http://writer.lan:8000/v1"
    plan = read(job(write_job, tmp_path, url, {}, allow_http_to="writer.lan")).plan
    assert plan is not None
    assert plan.content["teachers"]["w"]["api"].keys() == {"model", "max_tokens", "max_tokens_field", "extra"}
    assert read(job(write_job, tmp_path, url, {}, api_key_env=None)).problems == ()
