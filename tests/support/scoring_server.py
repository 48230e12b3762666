"""A server on loopback that scores as vLLM or SGLang does, from a Hugging Face folder; replies can be spoiled."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from mergeopd.models.tokenizer import Tokenizer

Spoil = Callable[[str, Any], Any]


@dataclass
class ScoringServer:
    """`spoil` gets the path and the reply of every request, and returns the reply: JSON, bytes, or a status."""

    model: torch.nn.Module
    tokenizer: Tokenizer
    engine: str
    hidden_states: bool = False
    version: str = ""
    max_tokens: int = 512
    spoil: Spoil = lambda path, reply: reply
    requests: list[tuple[str, Any]] = field(default_factory=list)
    url: str = ""

    def reply(self, path: str, body: Any) -> Any:
        """The reply to one request: JSON, bytes, or a status."""
        ids = (body or {}).get("tokens")
        match path:
            case "/version" if self.engine == "vllm":
                return {"version": self.version or "0.32.0"}
            case "/server_info" if self.engine == "sglang":
                return {"version": self.version or "0.5.23", "max_req_input_len": self.max_tokens}
            case "/openapi.json":
                own = "/pooling" if self.hidden_states else "/inference/v1/generate"
                return {"paths": {own: {}, "/generate": {}}}
            case "/health":
                return {}
            case "/v1/models":
                return {"data": [{"max_model_len": self.max_tokens, "root": "/models/teacher"}]}
            case "/detokenize" if self.engine == "vllm":
                return {"prompt": self.tokenizer.decode(ids, skip_special_tokens=False)}
            case "/v1/detokenize" if self.engine == "sglang":
                return {"text": self.tokenizer.decode(ids, skip_special_tokens=False)}
            case "/pooling" if self.engine == "vllm" and self.hidden_states:
                return self._hidden(body["input"][0]).astype("<f4").tobytes()
            case "/inference/v1/generate" if self.engine == "vllm" and not self.hidden_states:
                return self._vllm(body["token_ids"], body["sampling_params"])
            case "/generate" if self.engine == "sglang":
                return self._sglang(body["input_ids"], body)
        return 404

    @torch.no_grad()
    def _hidden(self, ids: Sequence[int]) -> np.ndarray:
        return self.model.base_model(torch.tensor([ids])).last_hidden_state[0].numpy()

    @torch.no_grad()
    def _logprobs(self, ids: Sequence[int]) -> np.ndarray:
        return self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()

    def _vllm(self, ids: Sequence[int], params: dict[str, Any]) -> dict[str, Any]:
        rows = self._logprobs(ids)
        reply: dict[str, Any] = {"choices": [{"token_ids": [0], "finish_reason": "length"}]}
        if "prompt_logprob_token_ids" in params:
            chosen, start = params["prompt_logprob_token_ids"], params["prompt_logprob_start"]
            if len(chosen) != len(ids) - 1 - start:
                return 400
            matrix = np.full((len(chosen), max(map(len, chosen))), -np.inf, np.float32)
            for i, row in enumerate(chosen):
                matrix[i, : len(row)] = rows[start + i, row]
            file = io.BytesIO()
            np.save(file, matrix)
            return {**reply, "prompt_token_id_logprobs": base64.b64encode(file.getvalue()).decode()}
        entries: list[Any] = [None]
        for row, token in zip(rows, ids[1:], strict=False):
            ranked = np.argsort(-row).tolist()
            kept = {*ranked[: params["prompt_logprobs"]], token}
            entries.append({str(i): {"logprob": row[i], "rank": ranked.index(i) + 1} for i in kept})
        return {**reply, "prompt_logprobs": entries}

    def _sglang(self, ids: Sequence[int], body: dict[str, Any]) -> dict[str, Any]:
        if body.get("return_hidden_states"):
            if not self.hidden_states or not body.get("extra_key"):
                return 400
            states = [self._hidden(ids).tolist()] if body["sampling_params"]["max_new_tokens"] else []
            return {"output_ids": [0], "meta_info": {"hidden_states": states}}
        start, k = body["logprob_start_len"], body["top_logprobs_num"]
        rows = self._logprobs(ids)[start:-1]
        # The last id is shown as 0, as SGLang does.
        shown = [token if token < rows.shape[1] - 1 else 0 for token in ids[start:]]
        own = [row[token] for row, token in zip(rows, ids[start + 1 :], strict=True)]
        given = [[value, token, None] for value, token in zip([None, *own], shown, strict=True)]
        meta: dict[str, Any] = {"input_token_logprobs": given}
        if k:
            best = np.argsort(-rows, 1)[:, :k].astype("<i4")
            values = np.take_along_axis(rows, best, 1).astype("<f4")
            meta["input_top_logprobs_shape"] = list(best.shape)
            for name, matrix in (("idx", best), ("val", values)):
                encoded = base64.b64encode(matrix.tobytes()).decode()
                meta[f"input_top_logprobs_{name}_flat_b64"] = encoded
                meta[f"input_top_logprobs_{name}_flat_b64_dtype"] = matrix.dtype.name
        return {"output_ids": [], "meta_info": meta}


@contextmanager
def scoring_server(folder: Path, engine: str, **settings: Any) -> Iterator[ScoringServer]:
    """Serve a folder's model in float64 on a free port."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    server = ScoringServer(model, Tokenizer.load(folder), engine, **settings)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def do_GET(self) -> None:
            self._answer(None)

        def _answer(self, body: Any) -> None:
            server.requests.append((self.path, body))
            reply = server.spoil(self.path, server.reply(self.path, body))
            status, content = (reply, b"refused") if isinstance(reply, int) else (200, reply)
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_port}"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
