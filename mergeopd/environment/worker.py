"""Run environments in a separate process that an `EnvironmentPool` starts: their code may hang or crash.

Requests and replies are JSON messages over the connection whose file descriptor is the argument.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from mergeopd.data.messages import RowError, read_message, read_tools
from mergeopd.environment.calculator import calculator
from mergeopd.environment.functions import functions, imported
from mergeopd.environment.http import HttpSession
from mergeopd.environment.protocol import Environment, Opening, Step, Tools
from mergeopd.environment.search import search
from mergeopd.errors import EnvironmentFailed
from mergeopd.recipe import environments as settings
from mergeopd.tool_calls import ToolCall

_MAX_MESSAGE = 500
_REPLY_ROLES = ("tool", "user")


def main(descriptor: int) -> None:
    """Build the environments that the first message describes, then serve their responses."""
    os.set_inheritable(descriptor, False)
    with Connection(descriptor) as connection:
        setup = json.loads(connection.recv_bytes())
        try:
            server = EnvironmentServer.of(setup)
        except BaseException as error:  # noqa: BLE001  user code may raise anything
            _send(connection, {"failure": _message(error)})
            return
        _send(connection, {})
        with suppress(EOFError):  # the pool was closed
            while True:
                _send(connection, server.reply(json.loads(connection.recv_bytes())))


@dataclass(frozen=True)
class EnvironmentServer:
    """Environments by source, with an object for every response in progress."""

    makers: Mapping[str, Callable[[], Environment]]
    _episodes: dict[int, Environment] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, setup: Mapping[str, Any]) -> EnvironmentServer:
        """Build the environments. Raises EnvironmentFailed for one that cannot work."""
        makers = {}
        for source, spec in setup["environments"].items():
            made = _maker(
                TypeAdapter(settings.Environment).validate_python(spec), frozenset(setup["allow_code"])
            )
            makers[source] = (lambda made=made: made) if isinstance(made, Tools) else made
        return cls(makers)

    def reply(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the reply to a request: `reset`, `step` or `end` of an episode."""
        episode = request["episode"]
        try:
            match request["op"]:
                case "reset":
                    environment = self._episodes[episode] = self.makers[request["source"]]()
                    return _opening(environment.reset(request["row"]))
                case "step":
                    calls = [ToolCall(**call) for call in request["calls"]]
                    return _step(self._episodes[episode].step(calls, request["content"]))
                case _:
                    for ended in request["episodes"]:
                        self._episodes.pop(ended, None)
                    return {}
        except BaseException as error:  # noqa: BLE001
            return {"failure": _message(error)}


def _maker(spec: settings.Environment, allow_code: Collection[str]) -> Tools | Callable[[], Environment]:
    match spec:
        case settings.CalculatorEnvironment():
            return calculator()
        case settings.SearchEnvironment():
            return search(Path(spec.corpus), spec.text_field, spec.num_results)
        case settings.FunctionsEnvironment():
            return functions(spec.functions, allow_code)
        case settings.UserEnvironment():
            return imported(spec.environment, allow_code)
        case settings.HttpEnvironment():
            return lambda: HttpSession(spec.url, spec.timeout_s)


def _opening(opening: Opening) -> dict[str, Any]:
    return {
        "messages": _checked(opening.messages, ("system", "user", "assistant", "tool")),
        "tools": list(read_tools("tools", list(opening.tools))),
    }


def _step(step: Step) -> dict[str, Any]:
    if step.reward is not None and not 0.0 <= step.reward <= 1.0:  # also NaN
        raise EnvironmentFailed(f"the reward is {step.reward!r}; it must be in [0, 1]")
    return {
        "messages": _checked(step.messages, _REPLY_ROLES),
        "done": bool(step.done),
        "reward": None if step.reward is None else float(step.reward),
        "num_failed": int(step.num_failed),
    }


def _checked(messages: Any, roles: Collection[str]) -> list[dict[str, Any]]:
    kept = []
    for i, written in enumerate(messages):
        try:
            message = read_message(f"messages[{i}]", written)
        except RowError as error:
            raise EnvironmentFailed(f"the environment's {error}") from error
        if message.role not in roles:
            raise EnvironmentFailed(
                f"the environment's messages[{i}] has the role {message.role!r}; it must be one of "
                f"{', '.join(roles)}"
            )
        kept.append(dict(message.fields) or {"role": message.role, "content": message.content})
    return kept


def _message(error: BaseException) -> str:
    text = str(error)
    named = text if isinstance(error, EnvironmentFailed) else f"{type(error).__name__}: {text}"
    return named[:_MAX_MESSAGE]


def _send(connection: Connection, reply: Mapping[str, Any]) -> None:
    connection.send_bytes(json.dumps(reply).encode())


if __name__ == "__main__":
    main(int(sys.argv[1]))
