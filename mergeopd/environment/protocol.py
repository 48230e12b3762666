"""The interface of environments, and the values that cross it as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mergeopd.tool_calls import ToolCall


@dataclass(frozen=True, slots=True)
class Opening:
    """What an environment adds to a prompt: messages behind it, and JSON schemas of tools."""

    messages: Sequence[Mapping[str, Any]] = ()
    tools: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """The replies to a turn, messages of tools or of a user; without any, the response is over.

    `reward` in [0, 1] is that of the whole response; the last one that is given counts. `num_failed` counts
    calls that could not be run.
    """

    messages: Sequence[Mapping[str, Any]] = ()
    done: bool = False
    reward: float | None = None
    num_failed: int = 0


class Environment(Protocol):
    """Runs the tools of one response. It may keep state: every response has an object of its own."""

    def reset(self, row: Mapping[str, Any]) -> Opening:
        """Begin a response to a prompt, of which `row` has key, domain, messages, reference and tools."""

    def step(self, tool_calls: Sequence[ToolCall], content: str) -> Step:
        """Run the calls of a turn. A turn without calls is the last unless there are replies."""


@dataclass(frozen=True)
class Tools:
    """An environment without state: functions, with their schemas by name.

    An exception is the reply to its call, so that the model can correct it.
    """

    schemas: Mapping[str, Mapping[str, Any]]
    functions: Mapping[str, Callable[..., str]]

    def reset(self, row: Mapping[str, Any]) -> Opening:
        return Opening(tools=tuple(self.schemas.values()))

    def step(self, tool_calls: Sequence[ToolCall], content: str) -> Step:
        replies = [self._run(call) for call in tool_calls]
        return Step([message for message, _ in replies], num_failed=sum(failed for _, failed in replies))

    def _run(self, call: ToolCall) -> tuple[dict[str, Any], bool]:
        try:
            if call.name not in self.functions:
                raise LookupError(f"unknown tool {call.name!r}; tools are {', '.join(self.functions)}")
            return reply(call, self.functions[call.name](**call.arguments)), False
        except Exception as error:  # noqa: BLE001  tools may raise anything
            return reply(call, f"Error: {error or type(error).__name__}"), True


def reply(call: ToolCall, content: str) -> dict[str, Any]:
    """Return the message of a tool with the result of a call."""
    return {"role": "tool", "name": call.name, "tool_call_id": call.id, "content": content}


def schema(name: str, description: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool's JSON schema in the form that chat templates take."""
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }
