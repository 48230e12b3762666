"""Real servers behind a proxy that injects faults: responses stay right, or the run stops with the cause."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_models import NUM_TOKENS
from engine_rollouts import assert_logprobs_right, generate, make_engine, write_recipe

import mergeopd
from mergeopd.errors import ServingError
from mergeopd.rollout.protocol import GenerationRequest
from mergeopd.types import Sampling

GENERATE = ("/inference/v1/generate", "/generate")
UPDATE = ("/collective_rpc", "/update_weights_from_disk")
HOW = Sampling(1.0, 1.0, 12)


@dataclass
class Proxy:
    """Forwards to a server. `faults` are taken, one by one, by requests for a response."""

    target: str
    faults: list[str] = field(default_factory=list)
    swallows_updates: bool = False
    refuses_updates: bool = False
    num_faults: int = 0
    url: str = ""

    def reply(self, path: str, body: bytes | None, end: threading.Event) -> tuple[int, bytes]:
        fault = ""
        if path in GENERATE and self.faults:
            fault, self.num_faults = self.faults.pop(0), self.num_faults + 1
        if fault == "500":
            return 500, b"injected"
        if fault == "hang":
            end.wait(30)
            return 500, b"injected"
        if path in UPDATE and self.refuses_updates:
            return 200, json.dumps({"success": False, "message": "injected"}).encode()
        if path in UPDATE and self.swallows_updates:
            request = json.loads(body or b"{}")
            if path == "/collective_rpc":
                return 200, b'{"results":[null]}'
            same = {"new_version": request["weight_version"]}
            self._forward("/update_weight_version", json.dumps(same).encode())
            return 200, b'{"success":true,"message":""}'
        status, content = self._forward(path, body)
        if fault == "half":
            return status, content[: len(content) // 2]
        if fault in ("short", "shifted"):
            return status, json.dumps(spoiled(json.loads(content), fault)).encode()
        return status, content

    def _forward(self, path: str, body: bytes | None) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.target + path, body, headers), timeout=60
            ) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


def spoiled(reply: dict[str, Any], fault: str) -> dict[str, Any]:
    """Drop the last log-probability, or give every token the one of the token before it."""
    if "choices" in reply:
        entries = reply["choices"][0]["logprobs"]["content"]
        reply["choices"][0]["logprobs"]["content"] = entries[:-1] if fault == "short" else rolled(entries)
    else:
        entries = reply["meta_info"]["output_token_logprobs"]
        reply["meta_info"]["output_token_logprobs"] = entries[:-1] if fault == "short" else rolled(entries)
    return reply


def rolled(entries: list[Any]) -> list[Any]:
    return [*entries[-1:], *entries[:-1]]


@contextmanager
def proxied(server: Any, **settings: Any) -> Iterator[Proxy]:
    proxy, end = Proxy(server.url, **settings), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(None)

        def do_POST(self) -> None:
            self._send(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

        def _send(self, body: bytes | None) -> None:
            status, content = proxy.reply(self.path, body, end)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    proxy.url = f"http://127.0.0.1:{http.server_address[1]}"
    yield proxy
    end.set()
    http.shutdown()
    http.server_close()


def test_faulty_replies_are_asked_for_again_and_not_used(server: Any, restored: None) -> None:
    faults = ["500", "half", "short", "shifted", "hang", "500", "half"]
    with proxied(server, faults=list(faults)) as proxy:
        engine = make_engine(server, proxy.url, timeout_s=8.0)
        engine.sync_weights(None, 1)  # type: ignore[arg-type]
        requests = [GenerationRequest(str(i), 0, np.arange(2, 12 + i)) for i in range(12)]
        responses = generate(engine, requests, HOW)
        engine.close()
    assert proxy.num_faults == len(faults)
    for request, response in zip(requests, responses, strict=True):
        assert response.response_ids.max() < NUM_TOKENS
        assert_logprobs_right(server.model, request.prompt_ids.tolist(), response, HOW)


def test_an_update_without_effect_is_found_by_the_comparison(
    server: Any, restored: None, engine_model: Callable[[int], Path], tmp_path: Path
) -> None:
    with proxied(server, swallows_updates=True) as proxy:
        recipe = write_recipe(tmp_path, server, engine_model(1), url=proxy.url, lr=0.05, bound=0.2)
        with pytest.raises(ServingError, match=r"log-probabilities .* differ .* cached states"):
            mergeopd.run(recipe)


def test_a_refused_update_stops_the_run(
    server: Any, restored: None, engine_model: Callable[[int], Path], tmp_path: Path
) -> None:
    if server.engine == "vllm":
        pytest.skip("vLLM has no `success` in the reply to an update")
    with proxied(server, refuses_updates=True) as proxy:
        recipe = write_recipe(tmp_path, server, engine_model(1), url=proxy.url)
        with pytest.raises(ServingError, match=r"refused the weights.*injected"):
            mergeopd.run(recipe)
