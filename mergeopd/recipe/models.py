"""The models of a recipe: the student, its teachers, their cards."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mergeopd.recipe.values import DIGEST_PATTERN, Name, PositiveInt, Strict, Weight


class Student(Strict):
    """The model that is trained."""

    model: str = Field(description="Hugging Face folder, or a hub id that is in the local cache")
    revision: str | None = Field(default=None, description="hub revision; not for folders")
    backend: Literal["torch"] = Field(default="torch", description="where the student is trained")
    dtype: Literal["float32", "bfloat16", "float64"] = Field(
        default="float32",
        description="precision of the forward pass; master weights, gradients and AdamW state are float32 "
        "(float64 throughout is for tests of exactness)",
    )
    micro_batch_tokens: PositiveInt = Field(
        default=16384, description="most tokens (prompts, responses and padding) in one forward and backward"
    )


class Canary(Strict):
    """A sample by which a teacher is recognised; `mergeopd new teacher` writes it."""

    prompt: str = Field(min_length=1, description="a user's message")
    response: str = Field(min_length=1, description="the teacher's own answer")
    logprobs: tuple[float, ...] = Field(
        min_length=1, description="log-probability of each token of the answer, in nats"
    )


class TeacherCard(Strict):
    """A file under `teachers/`: what a teacher is, independent of any recipe."""

    card: Literal[1] = Field(description="version of the card format")
    name: str = Field(description="for people")
    model: str = Field(description="Hugging Face folder, or a hub id that is in the local cache")
    revision: str | None = Field(default=None, description="hub revision; not for folders")
    tokenizer: str | None = Field(default=None, description="folder with the tokenizer; default: the model's")
    template: str | None = Field(
        default=None, description="file with a Jinja chat template; default: the tokenizer's own"
    )
    domains: tuple[Name, ...] = Field(
        default=(), description="domains it teaches when a prompt source names no teachers"
    )
    licence: str | None = Field(default=None, description="licence of the weights, for people")
    fingerprint: Annotated[str, Field(pattern=DIGEST_PATTERN)] | None = Field(
        default=None, description="of the checkpoint; other weights under this name are refused"
    )
    canary: Canary | None = Field(default=None, description="checked before the teacher teaches")


class TeacherRef(Strict):
    """A teacher in a recipe. Shorthand: the path of its card."""

    card: str = Field(description="teacher card, a YAML file")
    weight: Weight = Field(default=1.0, description="multiplies every prompt's weight for this teacher")
    dtype: Literal["float32", "bfloat16", "float64"] = Field(
        default="float32", description="precision of its forward pass and of its cached hidden states"
    )


def card_shorthand(value: Any) -> Any:
    return {"card": value} if isinstance(value, str) else value


Teacher = Annotated[TeacherRef, BeforeValidator(card_shorthand, json_schema_input_type=str | TeacherRef)]
