"""An inference server with the routes of vLLM or SGLang that the clients use, and faults on request.

    python tests/support/fake_server.py --engine vllm --model FOLDER --port 8200

As a program it generates with a small model of transformers; tests start it in a thread (`FakeServer`), mostly
with a table (`Table`). Equal prompts get equal responses from equal weights, in any order and after restarts.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

VLLM_GENERATE, SGLANG_GENERATE = "/inference/v1/generate", "/generate"
_SETTINGS = {"model_config": {"logprobs_mode": "processed_logprobs"}}
ROUTES = {
    "vllm": [
        *(VLLM_GENERATE, "/pause", "/resume", "/collective_rpc", "/reset_prefix_cache", "/server_info"),
        *("/update_weight_version", "/weight_info", "/version", "/v1/models", "/health", "/openapi.json"),
    ],
    "sglang": [
        *(SGLANG_GENERATE, "/server_info", "/model_info", "/v1/models", "/health", "/openapi.json"),
        *("/update_weights_from_disk", "/pause_generation", "/continue_generation"),
    ],
}


def stream_of(prompt_ids: Sequence[int]) -> tuple[int, str, int]:
    """Seed, key and sample of a prompt's random stream."""
    return 0, hashlib.blake2b(str(list(prompt_ids)).encode()).hexdigest(), 0


class Model(Protocol):
    """What the server serves."""

    def load(self, folder: Path) -> None:
        """Read the weights of a folder."""

    def respond(self, ids: Sequence[int], params: dict[str, Any]) -> tuple[list[int], list[float], str]:
        """Response, log-probabilities, and why it ended: "length", or the stop text or id as text."""

    def score(self, ids: Sequence[int]) -> list[float]:
        """Log-probability of every token but the first at temperature 1."""


class Table:
    """The next token's distribution depends on the last token; `load` reads `table.npy` (logits)."""

    def __init__(self, vocab: int = 8, seed: int = 0, words: Sequence[str] = ()) -> None:
        self.logits = np.random.default_rng(seed).normal(size=(vocab, vocab))
        self.words = words or [f"w{i} " for i in range(vocab)]

    def load(self, folder: Path) -> None:
        self.logits = np.load(folder / "table.npy")

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "table.npy", self.logits)
        return folder

    def logprobs(self, last: int, temperature: float = 1.0, bias: dict[str, float] | None = None) -> Any:
        row = self.logits[last] / temperature
        for token, value in (bias or {}).items():
            row = row + value * (np.arange(len(row)) == int(token))
        return row - np.logaddexp.reduce(row)

    def respond(self, ids: Sequence[int], params: dict[str, Any]) -> tuple[list[int], list[float], str]:
        _, key, _ = stream_of(ids)
        rng = np.random.default_rng(int(key[:15], 16))
        response: list[int] = []
        logprobs: list[float] = []
        limit = params.get("max_tokens", params.get("max_new_tokens"))
        while len(response) < limit:
            row = self.logprobs([*ids, *response][-1], params["temperature"], params["logit_bias"])
            token = int(rng.choice(len(row), p=np.exp(row)))
            response.append(token)
            logprobs.append(float(row[token]))
            text = "".join(self.words[i] for i in response)
            if token in params["stop_token_ids"]:
                return response, logprobs, str(token)
            if stops := [stop for stop in params["stop"] if stop in text]:
                return response, logprobs, stops[0]
        return response, logprobs, "length"

    def score(self, ids: Sequence[int]) -> list[float]:
        return [float(self.logprobs(a)[b]) for a, b in pairwise(ids)]


class TorchModel:
    """A model folder of transformers, decoded like the local engine decodes, one sequence at a time.

    Ids behind its tokenizer's vocabulary have no probability, as in trained models.
    """

    def __init__(
        self, folder: Path, stream: Callable[[Sequence[int]], tuple[int, str, int]] = stream_of
    ) -> None:
        from mergeopd.models.tokenizer import Tokenizer

        self.tokenizer, self.stream = Tokenizer.load(folder), stream
        self.load(folder)

    def load(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from mergeopd.loss.heads import Head

        torch.set_num_threads(1)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        self.body, self.head = model.get_decoder(), Head(model.get_output_embeddings().weight.detach())

    def respond(self, ids: Sequence[int], params: dict[str, Any]) -> tuple[list[int], list[float], str]:
        import torch

        from mergeopd.loss.heads import Head
        from mergeopd.rollout.local import Generator, generate
        from mergeopd.rollout.protocol import GenerationRequest
        from mergeopd.types import Sampling

        seed, key, sample = self.stream(ids)
        generator = Generator(
            self.body,
            Head(self.head.weight[: self.tokenizer.vocab_size]),
            params["stop_token_ids"],
            self.tokenizer,
            torch.device("cpu"),
        )
        limit = params.get("max_tokens", params.get("max_new_tokens"))
        sampling = Sampling(params["temperature"], params["top_p"], limit, tuple(params["stop"]))
        request = GenerationRequest(key, sample, np.array(ids, np.int32))
        (one,) = generate(generator, [request], sampling, seed=seed, batch_size=1, progress=lambda _: None)
        response = one.response_ids.tolist()
        ends = {"length": "length", "eos": str(response[-1]), "stop": (sampling.stop or ("",))[0]}
        return response, one.logprobs.tolist(), ends[one.finish]

    def score(self, ids: Sequence[int]) -> list[float]:
        import torch

        with torch.no_grad():
            hidden = self.body(input_ids=torch.tensor([list(ids)])).last_hidden_state[0, :-1]
            rows = torch.log_softmax(hidden @ self.head.weight.T, -1)
        return rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()  # type: ignore[no-any-return]


class _Cut(Exception):  # noqa: N818 (control flow)
    """Ends a connection."""


@dataclass
class FakeServer:
    """A server in a thread of this process.

    `faults` are names, consumed in order by the requests to a path: a status ("500", "429"), "drop" (the
    connection), "die" (the server, until `start`), "hang", "half" (a body), or a change of the reply, see
    `_spoiled`; "ok" is none. `requests` has path and body of all requests,
    `heads` their headers in lower case. `max_len` cuts responses.
    """

    model: Model
    engine: str = "vllm"
    version: str = ""
    routes: Sequence[str] | None = None
    max_len: int = 1024
    root: str = "model"
    delay_s: float = 0.0
    port: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    reports_versions: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    faults: dict[str, deque[str]] = field(default_factory=dict)
    requests: list[tuple[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    weight_version: str = "default"
    folder: str | None = None
    num_running: int = 0
    max_running: int = 0
    num_connections: int = 0
    is_paused: bool = False

    def __post_init__(self) -> None:
        self.routes = ROUTES[self.engine] if self.routes is None else self.routes
        self.version = self.version or {"vllm": "0.32.0", "sglang": "0.5.23"}[self.engine]
        self._loop = asyncio.new_event_loop()
        self._listening: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._connections: set[Any] = set()
        self._released = asyncio.Event()
        self._initial = self.model
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def generate_path(self) -> str:
        return VLLM_GENERATE if self.engine == "vllm" else SGLANG_GENERATE

    def fail(self, *names: str, path: str | None = None) -> None:
        """Add faults of the next requests to a path; default: to generate."""
        self.faults.setdefault(path or self.generate_path, deque()).extend(names)

    def generated(self) -> list[Any]:
        """Bodies of the requests to generate."""
        return [body for path, body in self.requests if path == self.generate_path]

    def start(self) -> None:
        """Listen, at the same port as before."""
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    def kill(self) -> None:
        """End all connections, and listen no more."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()

    def restart(self, model: Model | None = None) -> None:
        """Start as a new process does: with the weights of its model folder."""
        self.kill()
        self.model, self.weight_version, self.is_paused = model or self._initial, "default", False
        self.start()

    def close(self) -> None:
        """End the server and its thread."""
        if self._loop.is_running():
            self.kill()
            self._loop.call_soon_threadsafe(self._loop.stop)

    async def _listen(self) -> None:
        self._released = asyncio.Event()
        if not self.is_paused:
            self._released.set()
        self._listening = await asyncio.start_server(self._connected, "127.0.0.1", self.port, limit=1 << 26)
        self.port = self._listening.sockets[0].getsockname()[1]

    async def _end(self) -> None:
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        for writer in list(self._writers):
            writer.transport.abort()
        for task in self._connections - {asyncio.current_task()}:
            task.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self._connections.add(asyncio.current_task())
        self.num_connections += 1
        with suppress(
            _Cut,
            ConnectionError,
            asyncio.CancelledError,
            asyncio.IncompleteReadError,
            asyncio.LimitOverrunError,
        ):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                self.heads.append(head)
                _, target, *_ = head.split(" ", 2)
                length = head.partition("content-length:")[2].partition("\r\n")[0]
                body = await reader.readexactly(int(length)) if length else b""
                path = target.partition("?")[0]
                await self._reply(writer, path, json.loads(body) if body else None)
        self._writers.discard(writer)
        writer.close()
        self._connections.discard(asyncio.current_task())

    async def _reply(self, writer: asyncio.StreamWriter, path: str, body: Any) -> None:
        self.requests.append((path, body))
        queue = self.faults.get(path)
        fault = queue.popleft() if queue else "ok"
        if self._listening is None or fault == "drop":
            raise _Cut
        if fault == "die":
            await self._end()
            raise _Cut
        if fault == "hang":
            await asyncio.Event().wait()
        status, headers, reply = 200, "", None
        if fault[:3].isdigit():
            status, _, after = int(fault[:3]), *fault[3:].partition(":")[1:]
            headers = f"retry-after: {after}\r\n" if after else ""
            content = b'{"error":{"message":"planted"}}'
        else:
            self.num_running += 1
            self.max_running = max(self.max_running, self.num_running)
            try:
                status, reply = await self._handle(path, body, fault)
            finally:
                self.num_running -= 1
            content = b"" if reply is None else json.dumps(_spoiled(reply, fault)).encode()
        if fault == "empty_list":
            content = b"[]"
        if fault == "html":
            content = b"<html>; hello</html>"
        if fault == "half_json":
            content = content[: len(content) // 2]
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{headers}"
        writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode())
        if fault == "half":
            writer.write(content[: len(content) // 2])
            await writer.drain()
            raise _Cut
        writer.write(content)
        await writer.drain()

    async def _handle(self, path: str, body: Any, fault: str) -> tuple[int, Any]:
        if path not in (self.routes or ()):
            return 404, {"detail": "Not Found"}
        if path == self.generate_path:
            await self._released.wait()
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            return (self._vllm if self.engine == "vllm" else self._sglang)(body, fault)
        card = {"id": "student", "root": self.root, "max_model_len": self.max_len}
        match path:
            case "/health":
                return 200, None
            case "/openapi.json":
                return 200, {"paths": dict.fromkeys(self.routes or ())}
            case "/v1/models":
                return 200, {"data": [card]}
            case "/version":
                return 200, {"version": self.version}
            case "/server_info" if self.engine == "vllm":
                return 200, {"vllm_config": {**_SETTINGS, **self.settings}}
            case "/server_info":
                return 200, {"version": self.version, "model_path": self.root}
            case "/model_info" | "/weight_info":
                return 200, {"weight_version": self.weight_version}
            case "/pause" | "/pause_generation":
                self.is_paused = True
                self._released.clear()
                return 200, {"status": "paused"}
            case "/resume" | "/continue_generation":
                self.is_paused = False
                self._released.set()
                return 200, {"status": "resumed"}
            case "/collective_rpc":
                if body["method"] == "reload_weights":
                    self._load(body["kwargs"]["weights_path"], fault)
                return 200, {"results": [None]}
            case "/update_weight_version":
                self.weight_version = self.weight_version if fault == "old_version" else body["new_version"]
                return 200, {"success": True}
            case "/update_weights_from_disk":
                if fault == "refuse":
                    return 400, {"success": False, "message": "planted"}
                if fault == "not_done":
                    return 200, {"success": False, "message": "planted"}
                self._load(body["model_path"], fault)
                self.weight_version = (
                    self.weight_version if fault == "old_version" else body["weight_version"]
                )
                return 200, {"success": True}
        return 200, {"success": True}

    def _load(self, folder: str, fault: str) -> None:
        self.folder = folder
        if fault != "no_effect":
            self.model.load(Path(folder))

    def _vllm(self, body: Any, fault: str) -> tuple[int, Any]:
        ids, params = body["token_ids"], dict(body["sampling_params"])
        if params.get("prompt_logprobs") is not None:
            rows: list[Any] = [None]
            for token, value in zip(ids[1:], self.model.score(ids), strict=True):
                rows.append({str(token): {"logprob": value, "rank": 1, "decoded_token": None}})
            return 200, {"prompt_logprobs": rows, "choices": []}
        if len(ids) >= self.max_len:
            return 400, {"error": {"message": f"longer than the maximum model length of {self.max_len}"}}
        params["max_tokens"] = min(params["max_tokens"], self.max_len - len(ids))
        response, logprobs, end = self.model.respond(ids, params)
        is_id = end.isdigit()
        choice = {
            "index": 0,
            "token_ids": response,
            "finish_reason": "length" if end == "length" else "stop",
            "stop_reason": None if end == "length" else int(end) if is_id else end,
            "logprobs": {
                "content": [
                    {"token_id": t, "logprob": p, "rank": 1, "top_logprobs": []}
                    for t, p in zip(response, logprobs, strict=True)
                ]
            },
        }
        if self.reports_versions:
            version = {"version": self.weight_version, "start": 0, "end": len(response)}
            choice["weight_versions"] = [version]
        return 200, {"request_id": "x", "choices": [choice], "output_mode": "tokens"}

    def _sglang(self, body: Any, fault: str) -> tuple[int, Any]:
        ids, params = body["input_ids"], dict(body["sampling_params"])
        meta: dict[str, Any] = {"weight_version": self.weight_version}
        if params["max_new_tokens"] == 0:
            start = body["logprob_start_len"]
            scores = [None, *self.model.score(ids)[start:]]
            meta["input_token_logprobs"] = [[p, t, None] for p, t in zip(scores, ids[start:], strict=True)]
            return 200, {"output_ids": [], "meta_info": meta}
        if len(ids) + params["max_new_tokens"] > self.max_len:
            return 400, {"error": {"message": f"longer than the model's context length {self.max_len}"}}
        response, logprobs, end = self.model.respond(ids, params)
        matched = int(end) if end.isdigit() else end
        meta |= {
            "finish_reason": {"type": "length", "length": len(response)}
            if end == "length"
            else {"type": "stop", "matched": matched},
            "output_token_logprobs": [[p, t, None] for p, t in zip(logprobs, response, strict=True)],
        }
        if body.get("return_sampling_mask"):
            meta["output_token_sampling_logprobs"] = logprobs
        return 200, {"text": "", "output_ids": response, "meta_info": meta}


def _spoiled(reply: Any, fault: str) -> Any:
    """Change a reply to generate."""
    if not isinstance(reply, dict) or not reply.keys() & {"choices", "output_ids"}:
        return reply
    is_vllm = "choices" in reply
    choice = reply["choices"][0] if is_vllm else reply["meta_info"]
    entries = choice["logprobs"]["content"] if is_vllm else choice["output_token_logprobs"]
    key: Any = "logprob" if is_vllm else 0
    match fault:
        case "short":
            entries.pop()
        case "shifted":
            for entry in entries:
                entry["token_id" if is_vllm else 1] += 1
        case "null":
            entries[0][key] = None
        case "positive":
            entries[0][key] = 0.5
        case "empty":
            return {}
        case "list":
            return [reply]
        case "odd":  # fields of other types
            choice["logprobs" if is_vllm else "output_token_logprobs"] = ["odd"]
        case "abort" if is_vllm:
            choice["finish_reason"] = "abort"
        case "abort":
            choice["finish_reason"] = {"type": "abort"}
        case "default_version" | "newer_version":
            version = "default" if fault == "default_version" else "999"
            choice["weight_version"] = version
            choice["weight_versions"] = [{"version": version, "start": 0, "end": 1}]
    return reply


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", choices=("vllm", "sglang"), default="vllm")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0)
    arguments = parser.parse_args()
    server = FakeServer(
        TorchModel(arguments.model), arguments.engine, port=arguments.port, delay_s=arguments.delay
    )
    print(server.port, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
