"""Servers that score for a teacher, as its card names them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from mergeopd.config.values import Positive, PositiveInt, Strict


def url_shorthand(value: Any) -> Any:
    """Expand one address to a list."""
    return [value] if isinstance(value, str) else value


_Urls = Annotated[tuple[str, ...], Field(min_length=1)]
Urls = Annotated[_Urls, BeforeValidator(url_shorthand, json_schema_input_type=str | _Urls)]


def checked_urls(urls: tuple[str, ...]) -> tuple[str, ...]:
    """Return addresses of servers without a trailing slash. Raises ValueError for other texts."""
    for url in urls:
        if not url.startswith(("http://", "https://")) or any(map(str.isspace, url)):
            raise ValueError(f"'{url}' is not an address: write http://HOST:PORT")
    if len({url.rstrip("/") for url in urls}) < len(urls):
        raise ValueError("a server is named twice")
    return tuple(url.rstrip("/") for url in urls)


class Served(Strict):
    """Running servers with the teacher's weights."""

    url: Urls = Field(description="address of a server, or of several with the same weights")
    engine: Literal["vllm", "sglang"] = Field(description="inference engine of the servers")
    hidden_states: bool = False
    """the servers return hidden states, for losses on whole distributions: vLLM that runs with
    `--runner pooling --convert embed`, SGLang with `--enable-return-hidden-states`. Otherwise they return
    log-probabilities of single tokens"""
    concurrency: PositiveInt = 64
    """requests that run at once at each server, over all processes of the run"""
    timeout_s: Positive = Field(default=600.0, description="seconds that a request may take")

    @field_validator("url")
    @classmethod
    def _addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        return checked_urls(urls)
