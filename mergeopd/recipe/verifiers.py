"""Settings of verifiers, which grade responses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeAlias, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from mergeopd.config.values import Flag, FunctionPath, Positive, PositiveInt, Strict, Weight, kind_shorthand

MAX_PATTERN_LENGTH = 10_000
Columns: TypeAlias = Mapping[str, str | None]

Timeout = Annotated[
    float,
    Field(
        gt=0.0,
        allow_inf_nan=False,
        strict=True,
        description="seconds per response, in a worker process; a response that takes longer has no reward",
    ),
]


def pattern_problem(pattern: str) -> str | None:
    """Return why a text is not a usable regular expression, or None."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        return f"a regular expression of more than {MAX_PATTERN_LENGTH:,} characters"
    try:
        re.compile(pattern)
    except (re.error, OverflowError) as error:
        return f"not a regular expression: {error}"
    except RecursionError:
        return "not a usable regular expression: groups are nested too deeply"
    return None


class ExactVerifier(Strict):
    """Correct when the response, stripped of surrounding white space, equals the reference."""

    kind: Literal["exact"] = Field(description="verifier kind")
    ignore_case: Flag = False
    """compare case-insensitively"""


class RegexVerifier(Strict):
    """Correct when the pattern matches; if it has a group named `answer`, that group must equal the
    reference.
    """

    kind: Literal["regex"] = Field(description="verifier kind")
    pattern: str = Field(description="Python regular expression, searched in the whole response")
    timeout_s: Timeout = 2.0

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        problem = pattern_problem(pattern)
        if problem is not None:
            raise ValueError(problem)
        return pattern


class NumberVerifier(Strict):
    """Correct when the final number equals the reference, which must be one number.

    The final number is that after `####`, else in `\\boxed{}`, else after "answer is", else the last one.
    Of a response that was cut off, only a complete `####` line or box counts.
    """

    kind: Literal["number"] = Field(description="verifier kind")
    tolerance: Weight = Field(default=0.0, description="largest absolute difference that counts as equal")


class JsonVerifier(Strict):
    """Correct when the response is JSON and equal to the reference, ignoring key order and white space."""

    kind: Literal["json"] = Field(description="verifier kind")
    schema_file: str | None = None
    """JSON Schema file; the response must then satisfy the schema, and no reference is needed"""
    timeout_s: Timeout = 2.0


class MathVerifier(Strict):
    """Correct when the response's answer equals the reference as a mathematical expression (math-verify).

    Requires `pip install 'mergeopd[math]'`.
    """

    kind: Literal["math"] = Field(description="verifier kind")
    timeout_s: Timeout = 5.0


class UserVerifier(Strict):
    """A function `(answer: str, reference: str | None) -> float` in [0, 1], listed in `allow_code`."""

    kind: Literal["user"] = Field(description="verifier kind")
    function: FunctionPath = Field(description="function path, as listed in `allow_code`")
    timeout_s: Timeout = 10.0


FieldName = Annotated[str, Field(min_length=1)]


class ChoiceVerifier(Strict):
    """Correct when the response chooses the reference's option of a multiple-choice question.

    The reference is an option's letter, its number counted from `first_index`, or, with `options_field`, its
    text. The choice in a response is that in `\\boxed{}`, else after "answer is" or "answer:", else the
    response must begin with the letter, or be the option's text. Others choose nothing.
    """

    kind: Literal["choice"] = Field(description="verifier kind")
    first_index: Annotated[int, Field(ge=0, le=1, strict=True)] = 0
    """number of option A where references are numbers"""
    options_field: FieldName | None = None
    """field with the list of the options' texts"""

    @property
    def columns(self) -> Columns | None:
        return None if self.options_field is None else {"answer": None, "options": self.options_field}


class InstructionVerifier(Strict):
    """Correct when the response follows all of the row's instructions that a program can check (IFEval).

    Instructions have the names and arguments of IFEval (arXiv 2311.07911), except for
    `language:response_language`. Words and sentences are counted without a language model.
    """

    kind: Literal["instruction_following"] = Field(description="verifier kind")
    instructions_field: FieldName = "instruction_id_list"
    """field with the list of the instructions' names, such as `punctuation:no_comma`"""
    arguments_field: FieldName = "kwargs"
    """field with the list of their arguments, an object each"""

    @property
    def columns(self) -> Columns | None:
        return {"instructions": self.instructions_field, "arguments": self.arguments_field}


class ToolCallVerifier(Strict):
    """Correct when the response's tool calls are those of the reference, in any order, and fit the tools.

    The reference is a call, or a list of calls, each an object with `name` and `arguments`; `[]`: the
    response must not call a tool. Calls are read in the formats of Hermes and Qwen, Llama 3, Mistral and
    OpenAI. A malformed call makes the response incorrect.
    """

    kind: Literal["tool_call"] = Field(description="verifier kind")
    tools_field: FieldName | None = None
    """field with the tools' JSON schemas; calls must then be of these tools and have valid arguments"""
    compare: Flag = True
    """compare with the reference; otherwise any valid call of one of the tools is correct"""
    timeout_s: Timeout = 2.0

    @model_validator(mode="after")
    def _compares(self) -> Self:
        if not self.compare and self.tools_field is None:
            raise ValueError("with `compare: false` nothing is checked; name the `tools_field`")
        return self

    @property
    def columns(self) -> Columns | None:
        if not self.compare:
            return {"tools": self.tools_field}
        return None if self.tools_field is None else {"calls": None, "tools": self.tools_field}


class _CodeVerifier(Strict):
    timeout_s: Annotated[float, Field(gt=0.0, le=3600.0, strict=True)] = 10.0
    """seconds for all tests of a response; a program that takes longer is incorrect"""
    memory_mb: Annotated[int, Field(ge=16, strict=True)] = 512
    """memory of the program beyond the interpreter's, in MiB"""


class PythonTestsVerifier(_CodeVerifier):
    """Correct when the response's program passes the tests of the reference, in a sandbox.

    The program is the last fenced block of Python, or else the whole response. The reference is a list of
    statements such as `assert f(2) == 4`, a test program (assertions, functions `test_*`, or `unittest`), or
    `{"inputs": [...], "outputs": [...]}`: texts for standard input and the output expected for each; with
    `"fn_name"` lists of arguments and the values expected.
    """

    kind: Literal["python_tests"] = Field(description="verifier kind")
    setup_field: FieldName | None = None
    """field with statements that run before the tests, such as imports"""

    @property
    def columns(self) -> Columns | None:
        return None if self.setup_field is None else {"tests": None, "setup": self.setup_field}


class HumanEvalVerifier(_CodeVerifier):
    """Correct when the response completes the row's code such that `check(ENTRY_POINT)` passes, in a sandbox.

    The response continues the code, or defines the function again, also in a fenced block. The default
    fields are those of HumanEval.
    """

    kind: Literal["humaneval"] = Field(description="verifier kind")
    code_field: FieldName = "prompt"
    """field with the code that the response completes"""
    test_field: FieldName = "test"
    """field with the definition of `check`"""
    entry_point_field: FieldName = "entry_point"
    """field with the function's name"""

    @property
    def columns(self) -> Columns | None:
        return {"code": self.code_field, "test": self.test_field, "entry_point": self.entry_point_field}


class RewardModelVerifier(Strict):
    """The reward is `sigmoid(score / scale)` of a reward model, a sequence classifier with one label.

    It reads the conversation with the response, in its own tokenizer and chat template.
    """

    kind: Literal["reward_model"] = Field(description="verifier kind")
    card: str = Field(description="path of the reward model's card, in the format of teacher cards")
    scale: Positive = 1.0
    """score that changes the log-odds of the reward by 1"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of the forward pass; for large models, use the checkpoint's dtype to avoid a copy"""
    max_tokens: PositiveInt = 16384
    """maximum number of tokens, padding included, in one forward pass"""


_Single = (
    ExactVerifier
    | RegexVerifier
    | NumberVerifier
    | JsonVerifier
    | MathVerifier
    | ChoiceVerifier
    | InstructionVerifier
    | ToolCallVerifier
    | PythonTestsVerifier
    | HumanEvalVerifier
    | UserVerifier
)
SingleVerifier = Annotated[_Single, Field(discriminator="kind")]
_ShortKind = Literal[  # those that need no settings
    "exact",
    "number",
    "json",
    "math",
    "choice",
    "instruction_following",
    "tool_call",
    "python_tests",
    "humaneval",
]


def _combinable(value: Any) -> Any:
    """Expand the shorthand, and refuse a reward model, which is loaded for whole rounds."""
    value = kind_shorthand(value)
    if isinstance(value, Mapping) and value.get("kind") == "reward_model":
        raise ValueError("a reward model cannot be part of a combination: make it the verifier of a source")
    return value


class WeightedVerifier(Strict):
    """A verifier with its weight in a combination."""

    verifier: Annotated[
        SingleVerifier, BeforeValidator(_combinable, json_schema_input_type=_ShortKind | SingleVerifier)
    ] = Field(description="verifier; shorthand: its kind")
    weight: Positive = 1.0
    """relative weight"""
    reference_field: FieldName | None = None
    """field with this verifier's reference; default: that of the source"""


class CombinedVerifier(Strict):
    """Weighted mean of the rewards of several verifiers. If one fails, the response has no reward."""

    kind: Literal["combined"] = Field(description="verifier kind")
    of: tuple[WeightedVerifier, ...] = Field(min_length=2, description="verifiers with their weights")


Verifier = Annotated[_Single | RewardModelVerifier | CombinedVerifier, Field(discriminator="kind")]
IsolatedVerifier = (
    RegexVerifier
    | JsonVerifier
    | MathVerifier
    | ToolCallVerifier
    | PythonTestsVerifier
    | HumanEvalVerifier
    | UserVerifier
    | CombinedVerifier
)
"""Verifiers that run in worker processes, because patterns and code may not terminate."""

KINDS: tuple[str, ...] = tuple(
    get_args(model.model_fields["kind"].annotation)[0] for model in get_args(get_args(Verifier)[0])
)
"""Values of `verifier.kind`."""

VerifierOrKind = Annotated[
    Verifier, BeforeValidator(kind_shorthand, json_schema_input_type=_ShortKind | Verifier)
]


def single_verifiers(verifier: Verifier) -> dict[tuple[str | int, ...], _Single | RewardModelVerifier]:
    """Return a verifier, or those that it combines, by their path below `verifier`."""
    if isinstance(verifier, CombinedVerifier):
        return {("of", index, "verifier"): each.verifier for index, each in enumerate(verifier.of)}
    return {(): verifier}


def columns_of(verifier: Verifier) -> Columns | None:
    """Return the fields of which a reference consists, by its keys; None: it is one field's value.

    The field None is the source's `reference_field`.
    """
    return getattr(verifier, "columns", None)


def needs_reference(verifier: Verifier | None) -> bool:
    """Whether the verifier compares with a reference, so that every prompt must have one."""
    match verifier:
        case None | UserVerifier() | RewardModelVerifier():
            return False
        case JsonVerifier():
            return verifier.schema_file is None
        case RegexVerifier():
            return "answer" in re.compile(verifier.pattern).groupindex
        case CombinedVerifier():
            return any(needs_reference(each.verifier) for each in verifier.of)
        case _:
            return True
