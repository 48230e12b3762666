"""A chat API on loopback that replies as told, and records what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Mapping[str, str], Any]
MakeReply = Callable[[dict[str, Any], int], Reply]


def completion(content: str | None, finish: str = "stop", **message: Any) -> Reply:
    """A response, counted as 10 tokens in and 5 out. `stop_reason` belongs to the choice, other keys to the message."""
    choice = {"index": 0, "finish_reason": finish, "stop_reason": message.pop("stop_reason", None)}
    choice["message"] = {"role": "assistant", "content": content, **message}
    return 200, {}, {"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 5}}


class ChatServer:
    """`make_reply(body, number)` gives status, headers and JSON of a reply; `models` is None for an API without a list."""

    def __init__(self, make_reply: MakeReply) -> None:
        self.make_reply = make_reply
        self.models: list[str] | None = ["writer"]
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                listed = owner.models
                data = {"data": [{"id": name} for name in listed or ()]}
                self._send(404 if listed is None else 200, {}, data)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner._lock:
                    owner.bodies.append(body)
                    owner.keys.append(self.headers.get("Authorization"))
                    number = len(owner.bodies)
                self._send(*owner.make_reply(body, number))

            def _send(self, status: int, headers: Mapping[str, str], content: Any) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """A client that was killed has closed its connection."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> ChatServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
