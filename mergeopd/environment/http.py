"""A client for environment servers."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mergeopd.environment.protocol import Opening, Step
from mergeopd.errors import EnvironmentFailed
from mergeopd.tool_calls import ToolCall

_MAX_BYTES = 10_000_000


@dataclass
class HttpSession:
    """One response at a server.

    `POST /reset` with `{"row": {...}}` returns `{"session": ..., "messages": [...], "tools": [...]}`;
    `POST /step` with `{"session": ..., "tool_calls": [...], "content": "..."}` returns
    `{"messages": [...], "done": false, "reward": null, "num_failed": 0}`.
    """

    url: str
    timeout_s: float
    _session: Any = field(default=None, init=False)

    def reset(self, row: Mapping[str, Any]) -> Opening:
        reply = self._post("reset", {"row": row})
        self._session = reply.get("session")
        return Opening(reply.get("messages") or (), reply.get("tools") or ())

    def step(self, tool_calls: Sequence[ToolCall], content: str) -> Step:
        calls = [asdict(call) for call in tool_calls]
        reply = self._post("step", {"session": self._session, "tool_calls": calls, "content": content})
        return Step(
            reply.get("messages") or (),
            bool(reply.get("done")),
            reply.get("reward"),
            int(reply.get("num_failed") or 0),
        )

    def _post(self, path: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """Send JSON. Raises EnvironmentFailed for a server that cannot be reached, or errs."""
        address = f"{self.url.rstrip('/')}/{path}"
        request = urllib.request.Request(
            address, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                reply = json.loads(response.read(_MAX_BYTES))
        except urllib.error.HTTPError as error:
            raise EnvironmentFailed(f"{address}: status {error.code} {error.reason}") from error
        except (OSError, ValueError) as error:
            raise EnvironmentFailed(f"{address}: {getattr(error, 'reason', error)}") from error
        if not isinstance(reply, dict):
            raise EnvironmentFailed(f"{address}: the reply is no JSON object")
        return reply
