"""What `check` asks running servers, and what it reports."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, Table

from mergeopd.errors import RecipeError
from mergeopd.preflight.inputs import Inputs, preflight


@pytest.fixture(params=["vllm", "sglang"])
def server(request: pytest.FixtureRequest) -> Iterator[FakeServer]:
    server = FakeServer(Table(), request.param)
    yield server
    server.close()


def checked(write_job: Callable[..., Path], server: FakeServer, rollout: Mapping[str, Any] = {}) -> Inputs:
    section = {"engine": server.engine, "url": server.url, "max_new_tokens": 4, **rollout}
    return preflight(write_job({"rollout": section}))


def refused(write_job: Callable[..., Path], server: FakeServer, rollout: Mapping[str, Any] = {}) -> str:
    with pytest.raises(RecipeError) as caught:
        checked(write_job, server, rollout)
    return str(caught.value)


def test_a_fit_server_has_no_problem(
    write_job: Callable[..., Path], server: FakeServer, tmp_path: Path
) -> None:
    server.root = str(tmp_path / "base")
    assert not [note for note in checked(write_job, server).notes if "server" in note]


def test_another_model_is_told_by_what_differs(
    write_job: Callable[..., Path], server: FakeServer, tmp_path: Path
) -> None:
    server.root = str(tmp_path / "one")
    told = refused(write_job, server)
    assert "rollout.url" in told
    assert f"{server.url} runs another model than the student: hidden_size is 48 in" in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "0.0.1"}, "is too old"),
        ({"max_len": 6}, "the inference server"),
        ({"routes": ["/health"]}, "status 404"),
    ],
)
def test_servers_that_do_not_fit_are_named(
    write_job: Callable[..., Path], server: FakeServer, changes: Mapping[str, Any], message: str
) -> None:
    for name, value in changes.items():
        setattr(server, name, value)
    told = refused(write_job, server)
    assert message in told
    assert server.url in told or "max_len" in changes


@pytest.mark.parametrize("fault", ["html", "half_json", "empty_list", "500", "drop"])
def test_a_service_that_is_no_engine_is_no_traceback(
    write_job: Callable[..., Path], server: FakeServer, fault: str
) -> None:
    path = "/version" if server.engine == "vllm" else "/server_info"
    server.fail(fault, path=path)
    assert server.url in refused(write_job, server)


def test_the_key_comes_from_the_environment_and_is_sent(
    write_job: Callable[..., Path], server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SERVER_KEY", raising=False)
    own = {"api_key_env": "SERVER_KEY"}
    assert "the environment variable SERVER_KEY is not set" in refused(write_job, server, own)
    monkeypatch.setenv("SERVER_KEY", "s3cret")
    checked(write_job, server, own)
    assert "authorization: bearer s3cret" in server.heads[-1]
    server.version = "0.0.1"
    assert "s3cret" not in refused(write_job, server, own)


def test_responses_of_older_weights_without_a_correction_are_noted(
    write_job: Callable[..., Path], server: FakeServer
) -> None:
    section = {"engine": server.engine, "url": server.url, "max_new_tokens": 4, "ahead": 1}
    phase = {"name": "merge", "updates": 2, "prompts_per_round": 4, "loss": "sampled_reverse_kl"}
    recipe = write_job({"rollout": section, "phases": [phase]})
    assert [note for note in preflight(recipe).notes if "`correction: truncate`" in note]
    document = json.loads(recipe.read_text())
    document["phases"][0]["correction"] = "truncate"
    recipe.write_text(json.dumps(document))
    assert not [note for note in preflight(recipe).notes if "`correction: truncate`" in note]
