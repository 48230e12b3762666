"""Settings of environments, which run the tools that a model calls."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from mergeopd.config.values import Flag, FunctionPath, PositiveInt, Strict, kind_shorthand


class EnvironmentSettings(Strict):
    """Limits of a response of several turns."""

    max_turns: PositiveInt = 8
    """turns of the assistant; a response that calls tools in its last turn is truncated"""
    max_tokens: PositiveInt = 4096
    """tokens of a response: all turns and what tools return"""
    timeout_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False, strict=True)] = 10.0
    """seconds for the calls of one turn, in a worker process; a response that takes longer ends there"""


class CalculatorEnvironment(EnvironmentSettings):
    """The tool `calculator(expression)`: exact arithmetic with + - * / // % ** and parentheses."""

    kind: Literal["calculator"] = Field(description="environment kind")


class SearchEnvironment(EnvironmentSettings):
    """The tool `search(query)`: BM25 over the documents of a file.

    Requires `pip install 'mergeopd[search]'`.
    """

    kind: Literal["search"] = Field(description="environment kind")
    corpus: str = Field(description="JSON lines file: objects with a text, and a title if they have one")
    text_field: str = "text"
    """field with a document's text"""
    num_results: PositiveInt = 3
    """documents that a search returns"""


class FunctionsEnvironment(EnvironmentSettings):
    """Python functions as tools: their schemas are made from signature and docstring."""

    kind: Literal["functions"] = Field(description="environment kind")
    functions: Annotated[tuple[FunctionPath, ...], Field(min_length=1)]
    """functions with type hints, listed in `allow_code`; they get the arguments of a call by name"""


class UserEnvironment(EnvironmentSettings):
    """A Python class with `reset(row)` and `step(tool_calls, content)`; an object for every response."""

    kind: Literal["user"] = Field(description="environment kind")
    environment: FunctionPath = Field(description="the class, as listed in `allow_code`")
    gives_reward: Flag = False
    """`step` returns the reward of a response, which then needs no verifier"""


class HttpEnvironment(EnvironmentSettings):
    """A server with `POST /reset` and `POST /step`, in JSON."""

    kind: Literal["http"] = Field(description="environment kind")
    url: str = Field(description="address of the server, without `/reset`")
    gives_reward: Flag = False
    """`/step` returns the reward of a response, which then needs no verifier"""

    @field_validator("url")
    @classmethod
    def _is_address(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")) or any(map(str.isspace, url)):
            raise ValueError("not an address: write http://HOST:PORT or https://HOST")
        return url


Environment = Annotated[
    CalculatorEnvironment | SearchEnvironment | FunctionsEnvironment | UserEnvironment | HttpEnvironment,
    Field(discriminator="kind"),
]
EnvironmentOrKind = Annotated[
    Environment,
    BeforeValidator(kind_shorthand, json_schema_input_type=Literal["calculator"] | Environment),
]


def gives_reward(environment: Environment | None) -> bool:
    """Whether an environment rewards its responses."""
    return isinstance(environment, UserEnvironment | HttpEnvironment) and environment.gives_reward
