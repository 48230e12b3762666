"""The models of a recipe: the student, its teachers, their cards."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from mergeopd.config.values import DIGEST_PATTERN, Name, PositiveInt, Revision, Strict, Weight
from mergeopd.recipe.bridges import BridgeOrKind


class Parallel(Strict):
    """How a student on Megatron is spread over processes; `tensor` x `pipeline` of them hold a copy of it."""

    tensor: PositiveInt = Field(
        default=1,
        description="processes that share each matrix; divides attention heads, key-value heads and "
        "feed-forward units",
    )
    pipeline: PositiveInt = Field(
        default=1, description="stages of the model, one after another; divides its layers"
    )
    sequence: bool = Field(
        default=False, description="also split activations between matrices along the sequence"
    )
    recompute: bool = Field(
        default=False,
        description="keep of each layer its input alone and run it again in the backward pass: less memory, "
        "about a third more time",
    )
    layers: Literal["auto", "local", "transformer_engine"] = Field(
        default="auto",
        description="whose layers: transformer engine's, or Megatron's own; `auto`: transformer engine's on "
        "a GPU where it can be imported",
    )


class Student(Strict):
    """The model that is trained."""

    model: str = Field(description="Hugging Face folder, or a hub id that is in the local cache")
    revision: Revision | None = Field(default=None, description="hub revision; not for folders")
    template: str | None = Field(
        default=None,
        description="file with a Jinja chat template, also for the export; default: the tokenizer's own",
    )
    end_tokens: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None = (
        Field(
            default=None,
            description="tokens that end its responses, also of the export; default: those of its "
            "generation_config.json and the special token that the chat template writes behind an "
            "assistant's turn",
        )
    )
    backend: Literal["torch", "megatron"] = Field(
        default="torch",
        description="what trains the student: torch, in one process, or megatron-core, in one or several",
    )
    parallel: Parallel = Field(
        default=Parallel(),
        description="the grid of processes, with `backend: megatron`; it may change when a run goes on",
    )
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
    revision: Revision | None = Field(default=None, description="hub revision; not for folders")
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


class Moving(Strict):
    """Weights that follow the student: `every` or `ema`. They change between rounds only."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["every"]}, {"required": ["ema"]}]})

    every: PositiveInt | None = Field(
        default=None,
        description="copied anew at the first start of a round at or after each multiple of so many updates; "
        "1: at the start of every round",
    )
    ema: Annotated[float, Field(gt=0.0, lt=1.0, strict=True)] | None = Field(
        default=None,
        description="moving average: after every round `ema` of the old average plus `1 - ema` of the "
        "student's weights",
    )

    @model_validator(mode="after")
    def _one_rule(self) -> Moving:
        if (self.every is None) == (self.ema is None):
            raise ValueError("give one of `every` and `ema`")
        return self


class TeacherRef(Strict):
    """A teacher in a recipe: another model by its card, or the student itself. Shorthand: the card's path."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["card"]}, {"required": ["student"]}]}
    )

    card: str | None = Field(default=None, description="teacher card, a YAML file; this or `student`")
    student: Literal["start"] | Moving | None = Field(
        default=None,
        description="the student as its own teacher, with its weights at the `start` of the run or with ones "
        "that follow; where it is the expert of an evaluation, it is measured with those of the start",
    )
    weight: Weight = Field(default=1.0, description="multiplies every prompt's weight for this teacher")
    dtype: Literal["float32", "bfloat16", "float64"] | None = Field(
        default=None,
        description="precision of its forward pass and of its cached hidden states; default: float32, with "
        "`student` the student's",
    )
    system: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="system message that only this teacher sees, before the conversation or in place of the "
        "prompt's own",
    )
    prompt: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="Jinja template of the last user message as only this teacher sees it; `prompt` is the "
        "message's text, `reference` the row's reference, any other name a field of the row, which every row "
        "must have. Evaluation does not use one that shows more than `prompt`",
    )

    bridge: BridgeOrKind | None = Field(
        default=None,
        description="how to learn from a teacher with another tokenizer (a name, or one with its settings): "
        "in phases that ask teachers it stands for the teachers' terms, with the sum of their weights",
    )

    @model_validator(mode="after")
    def _one_model(self) -> TeacherRef:
        if self.card is None and self.student is None:
            raise ValueError(
                "no model: name a `card`, or give `student: start` for the student as its own teacher"
            )
        if self.card is not None and self.student is not None:
            raise ValueError("`card` and `student` name two models: remove one")
        if self.student is not None and self.bridge is not None:
            raise ValueError("the student's own tokenizer needs no `bridge`: remove it")
        return self


def card_shorthand(value: Any) -> Any:
    return {"card": value} if isinstance(value, str) else value


Teacher = Annotated[TeacherRef, BeforeValidator(card_shorthand, json_schema_input_type=str | TeacherRef)]
