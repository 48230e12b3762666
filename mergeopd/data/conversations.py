"""Split whole conversations, as chat models are fine-tuned on, into prompts and responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergeopd.data.messages import RowError, kind

# Roles of ShareGPT's `{from, value}`.
_SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant", "observation": "tool"}


def split_conversation(field: str, conversation: Any) -> tuple[list[Any], str | list[Any] | None]:
    """Return the messages up to the last one of the user, and the response: those after it.

    One message of role and content is a response as text, several are a trajectory; without any the response
    is None. Messages may be ShareGPT's. Raises RowError if the user says nothing.
    """
    if not isinstance(conversation, list):
        raise RowError(f"field {field!r} must be a list of messages, not {kind(conversation)}")
    messages = [_message(f"{field}[{i}]", message) for i, message in enumerate(conversation)]
    ends = [i for i, message in enumerate(messages, 1) if _value(message, "role") == "user"]
    if not ends:
        raise RowError(f"field {field!r} has no message of the user, which a prompt ends with")
    prompt, response = messages[: ends[-1]], messages[ends[-1] :]
    if len(response) == 1 and isinstance(response[0], Mapping):
        plain = {key: value for key, value in response[0].items() if value is not None}
        text = plain.get("content")
        if plain.keys() == {"role", "content"} and plain["role"] == "assistant" and isinstance(text, str):
            return prompt, text
    return prompt, response or None


def _value(message: Any, key: str) -> Any:
    return message.get(key) if isinstance(message, Mapping) else None


def _message(place: str, message: Any) -> Any:
    """Convert a message of ShareGPT; others are returned unchanged."""
    speaker = _value(message, "from")
    if speaker is None:
        return message
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RowError(
            f"{place}.from is {speaker!r}; must be one of {', '.join(_SHAREGPT_ROLES)}, or write messages of "
            "role and content"
        )
    return {"role": role, "content": message.get("value")}
