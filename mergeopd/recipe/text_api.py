"""Teachers behind a chat API, which write text only."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from mergeopd.config.values import (
    VARIABLE_PATTERN,
    Flag,
    NonEmptyText,
    Positive,
    PositiveInt,
    Strict,
    Weight,
)

# Fields of a request that follow from the recipe, or that change the form of the reply.
_RESERVED = ("model", "messages", "tools", "n", "stop", "stream")
_ADDRESS = "not an address: write https://HOST/v1, without a key, a query or `/chat/completions`"


class Prices(Strict):
    """Prices of a model, in dollars per million tokens."""

    input: Weight = Field(description="prompt tokens")
    output: Weight = Field(description="response tokens, with those of reasoning")


class TextApi(Strict):
    """A model behind an OpenAI-compatible chat API. It generates text, and provides no targets."""

    url: str = Field(description="base address, to which `/chat/completions` is added")
    model: NonEmptyText = Field(description="the API's name of the model")
    api_key_env: Annotated[str, Field(pattern=VARIABLE_PATTERN)] | None = None
    """name of the environment variable with the API key, in capitals; default: no key is sent"""
    allow_http_to: NonEmptyText | None = None
    """host to which the key may be sent unencrypted; needed for `http://` and another machine"""
    concurrency: PositiveInt = Field(default=16, description="requests that run at once")
    timeout_s: Positive = Field(default=600.0, description="seconds that a response may take")
    max_tokens: PositiveInt | None = None
    """limit of a response in the API's tokens; default: the `max_new_tokens` of the phase. More leaves room
    for reasoning that the API does not return"""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """name of the limit in requests; OpenAI's reasoning models take `max_completion_tokens` only"""
    extra: dict[str, Any] = Field(default={})
    """further fields of a request, such as `reasoning_effort: low`; they replace others, and null removes one
    that an API does not take, such as `seed: null`"""
    prices: Prices | None = Field(default=None, description="prices, from which the cost is computed")
    probe: Flag = True
    """whether `check` asks the API for the names of its models"""

    @field_validator("api_key_env", mode="before")
    @classmethod
    def _is_name(cls, name: Any) -> Any:
        # The message must not repeat a key that was written here by mistake.
        if isinstance(name, str) and not re.fullmatch(VARIABLE_PATTERN, name):
            raise ValueError(
                "not the name of an environment variable, such as OPENAI_API_KEY; the key itself must not "
                "be in a file"
            )
        return name

    @field_validator("url")
    @classmethod
    def _is_address(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            has_more = parts.username is not None or parts.query or parts.fragment or parts.port == 0
        except ValueError:
            raise ValueError(_ADDRESS) from None
        path = parts.path.rstrip("/")
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or has_more
            or any(map(str.isspace, url))
            or path.endswith("/completions")
        ):
            raise ValueError(_ADDRESS)
        return f"{parts.scheme}://{parts.netloc}{path}"

    @field_validator("extra")
    @classmethod
    def _is_free(cls, extra: dict[str, Any]) -> dict[str, Any]:
        for name in extra:
            if name in _RESERVED:
                raise ValueError(f"'{name}' is set by mergeopd: remove it")
        return extra

    @model_validator(mode="after")
    def _key_is_encrypted(self) -> TextApi:
        is_plain = self.url.startswith("http://") and not self.is_loopback
        if self.api_key_env is not None and is_plain and self.allow_http_to != self.host:
            raise ValueError(
                f"the key would be sent unencrypted to {self.host}: use https, or allow this host with "
                f"`allow_http_to: {self.host}`"
            )
        return self

    @property
    def host(self) -> str:
        """The host of the address."""
        return urlsplit(self.url).hostname or ""

    @property
    def is_loopback(self) -> bool:
        """Whether the host is this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
