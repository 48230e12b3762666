"""Chat completions of OpenAI-compatible APIs: requests, replies, keys."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergeopd.errors import ServingError
from mergeopd.serving.transport import BadReply, ServerPool
from mergeopd.types import REASONING_KEYS, Message, Sampling

COMPLETIONS = "/chat/completions"
_PROBE_S = 5.0
_MAX_ATTEMPTS = 8
# What APIs call a response that ended by itself: with its end token, with calls of tools, or at a stop text.
_ENDED = frozenset({"stop", "tool_calls", "function_call", "eos", "eos_token", "end_turn"})


@dataclass(frozen=True, slots=True)
class ChatReply:
    """A response of a chat API, with the tokens that it counted.

    `message` has `content` and, where there are some, `reasoning_content` and `tool_calls`. `is_cut`: it
    ended at the length limit. `stop` is the stop text that ended it, if the API tells. `fault` says why it
    cannot be used: the API refused or filtered it.
    """

    message: dict[str, Any]
    is_cut: bool = False
    stop: str | None = None
    fault: str | None = None
    num_prompt: int = 0
    num_response: int = 0


@dataclass(frozen=True)
class ChatEndpoint:
    """The address of an API, with the key."""

    url: str
    key: str = field(default="", repr=False)
    is_local: bool = False

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def pool(self, concurrency: int, timeout_s: float) -> ServerPool:
        """Return a client that repeats requests as long as another attempt may succeed."""
        return ServerPool(
            (self.url,),
            max_running=concurrency,
            timeout_s=timeout_s,
            max_attempts=_MAX_ATTEMPTS,
            headers=self._headers,
            health=None,
            trust_env=not self.is_local,
        )

    def models(self) -> list[str] | None:
        """Return the names of the API's models; None where it does not list them. Raises ServingError."""
        import httpx2

        try:
            reply = httpx2.get(
                f"{self.url}/models", headers=self._headers, timeout=_PROBE_S, trust_env=not self.is_local
            )
        except httpx2.HTTPError as error:
            raise ServingError(f"{self.url}: not reachable ({str(error) or type(error).__name__})") from None
        if reply.status_code in (401, 403):
            what = "refuses the key" if self.key else "needs a key"
            raise ServingError(f"{self.url}: {what} (status {reply.status_code})")
        if 300 <= reply.status_code < 400 or reply.status_code >= 500:
            raise ServingError(f"{self.url}/models: has status {reply.status_code}")
        try:
            return [str(row["id"]) for row in reply.json()["data"]] if reply.status_code == 200 else None
        except (ValueError, KeyError, TypeError):
            return None


def read_key(variable: str, env: Mapping[str, str] = os.environ) -> str:
    """Return the key in an environment variable. Raises ServingError, which does not contain it."""
    key = env.get(variable, "").strip()
    if not key:
        raise ServingError(f"environment variable '{variable}' is not set")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ServingError(f"environment variable '{variable}' has characters that no key has")
    return key


def chat_body(
    model: str,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    sampling: Sampling,
    *,
    seed: int,
    max_tokens_field: str,
    max_tokens: int | None,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the body of a request for one response; `extra` replaces fields, and its nulls remove them."""
    body: dict[str, Any] = {
        "model": model,
        "messages": wire_messages(messages),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        max_tokens_field: max_tokens or sampling.max_new_tokens,
        "n": 1,
        "seed": seed,
    }
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if tools:
        body["tools"] = [
            dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}
            for tool in tools
        ]
    return {name: value for name, value in {**body, **extra}.items() if value is not None}


def wire_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages as APIs take them: arguments of calls as JSON text, an id for each, no reasoning.

    Calls and replies without an id are paired in their order.
    """
    wire: list[dict[str, Any]] = []
    open_ids: list[str] = []
    for position, message in enumerate(messages):
        one: dict[str, Any] = {"role": message.role, "content": message.content}
        one |= {
            k: v for k, v in message.fields.items() if k not in (*REASONING_KEYS, "tool_calls", "content")
        }
        if message.tool_calls:
            one["tool_calls"] = [
                _wire_call(c, f"call_{position}_{i}") for i, c in enumerate(message.tool_calls)
            ]
            open_ids = [call["id"] for call in one["tool_calls"]]
        if message.role == "tool":
            own = one.setdefault("tool_call_id", open_ids[0] if open_ids else f"call_{position}")
            open_ids = [other for other in open_ids if other != own]
        wire.append(one)
    return wire


def _wire_call(call: Mapping[str, Any], otherwise: str) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments") or {}
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {
        "id": str(call.get("id") or otherwise),
        "type": "function",
        "function": {"name": function["name"], "arguments": text},
    }


def read_reply(reply: Any) -> ChatReply:
    """Read the reply to a request for one response. Raises BadReply for one that is no reply to it."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise BadReply("the reply has no response")
    content, reason = message.get("content"), choice.get("finish_reason")
    if not isinstance(content, str | None):
        raise BadReply("the content of the response is no text")
    kept: dict[str, Any] = {"role": "assistant", "content": content or ""}
    reasoning = next(
        (message[k] for k in REASONING_KEYS if isinstance(message.get(k), str) and message[k]), None
    )
    if reasoning is not None:
        kept["reasoning_content"] = reasoning
    if message.get("tool_calls"):
        kept["tool_calls"] = message["tool_calls"]
    is_cut = reason == "length"
    stop = choice.get("stop_reason") or choice.get("matched_stop")  # vLLM, SGLang
    return ChatReply(
        message=kept,
        is_cut=is_cut,
        stop=stop if isinstance(stop, str) and not is_cut else None,
        fault=_fault(message, kept, reason),
        num_prompt=_count(reply, "prompt_tokens"),
        num_response=_count(reply, "completion_tokens"),
    )


def _fault(message: Mapping[str, Any], kept: Mapping[str, Any], reason: Any) -> str | None:
    if message.get("refusal"):
        return "refused by the model"
    if reason == "length" and not kept["content"]:
        return "cut before any text"
    if reason == "length":
        # Templates end reasoning and calls that were cut as if they were whole.
        return "cut in reasoning or calls" if len(kept) > 2 else None
    if reason not in _ENDED:
        return f"ended with {reason!r}"
    return None if kept["content"].strip() or kept.get("tool_calls") else "empty"


def _count(reply: Mapping[str, Any], name: str) -> int:
    usage = reply.get("usage")
    count = usage.get(name) if isinstance(usage, Mapping) else None
    return count if isinstance(count, int) and count > 0 else 0
