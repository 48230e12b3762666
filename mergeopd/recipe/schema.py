"""What may stand in a recipe and in a teacher card. Only what is implemented is accepted.

Descriptions here are user documentation: they become the JSON Schema that editors show.
Validators raise ValueError only; another type would escape pydantic and lose the place in the file.

Values are strict: a quoted number is text, a boolean is no number. Relative paths start from the project
folder: the parent of the nearest folder named `recipes` (`teachers` for a card) above the file that contains
the path, otherwise that file's own folder. `~` is the home folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from mergeopd.recipe.losses import PARAMETRIC_TERMS, LossOrTerm, loss_shorthand, weight_shorthand
from mergeopd.recipe.values import DIGEST_PATTERN, Fraction, FunctionPath, Name, PositiveInt, Strict, Weight

# --------------------------------------------------------------------------------------------- student


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


# -------------------------------------------------------------------------------------------- teachers


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


def _card_shorthand(value: Any) -> Any:
    return {"card": value} if isinstance(value, str) else value


Teacher = Annotated[TeacherRef, BeforeValidator(_card_shorthand, json_schema_input_type=str | TeacherRef)]


# ------------------------------------------------------------------------------------------- verifiers


class ExactVerifier(Strict):
    """Right when the answer, stripped of outer white space, equals the reference."""

    kind: Literal["exact"] = Field(description="names the verifier")
    ignore_case: Annotated[bool, Field(strict=True)] = Field(
        default=False, description="compare without regard to upper and lower case"
    )


class RegexVerifier(Strict):
    """Right when the pattern matches; with a group named `answer`, that group must equal the reference."""

    kind: Literal["regex"] = Field(description="names the verifier")
    pattern: str = Field(description="Python regular expression, searched in the whole answer")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern


class NumberVerifier(Strict):
    """Right when the final number equals the reference's final number (after `####` where there is one)."""

    kind: Literal["number"] = Field(description="names the verifier")
    tolerance: Weight = Field(default=0.0, description="largest absolute difference that still counts")


class JsonVerifier(Strict):
    """Right when the answer is JSON and equal to the reference, key order and white space apart."""

    kind: Literal["json"] = Field(description="names the verifier")
    schema_file: str | None = Field(
        default=None, description="JSON Schema file; then the answer must satisfy it and needs no reference"
    )


class UserVerifier(Strict):
    """A function `(answer: str, reference: str | None) -> float` in [0, 1], named in `allow_code`."""

    kind: Literal["user"] = Field(description="names the verifier")
    function: FunctionPath = Field(description="the function, as it stands in `allow_code`")


Verifier = Annotated[
    ExactVerifier | RegexVerifier | NumberVerifier | JsonVerifier | UserVerifier, Field(discriminator="kind")
]


def _kind_shorthand(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


VerifierOrKind = Annotated[
    Verifier,
    BeforeValidator(
        _kind_shorthand,
        json_schema_input_type=Literal["exact", "number", "json"] | Verifier,
    ),
]


# --------------------------------------------------------------------------------------------- prompts


def _teachers_shorthand(value: Any) -> Any:
    if isinstance(value, str):
        return {value: 1.0}
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        if twice := [name for name in value if value.count(name) > 1]:
            raise ValueError(f"teacher '{twice[0]}' is named twice: name it once, or give weights")
        return dict.fromkeys(value, 1.0)
    return value


_Weights = Annotated[dict[Name, Weight], Field(min_length=1)]

Routing = Annotated[
    _Weights,
    BeforeValidator(
        _teachers_shorthand,
        json_schema_input_type=Name | Annotated[list[Name], Field(min_length=1)] | _Weights,
    ),
]


class PromptSource(Strict):
    """A file of prompts of one domain."""

    source: str = Field(description=".jsonl or .parquet file")
    domain: Name = Field(description="the prompts' domain, for routing, budgets and the report")
    verifier: VerifierOrKind | None = Field(
        default=None, description="how an answer is checked; shorthand: its kind"
    )
    prompt_field: str = Field(
        default="prompt", description="field with the prompt: text, or a list of {role, content} messages"
    )
    reference_field: str = Field(default="answer", description="field with the verifier's reference")


class TrainSource(PromptSource):
    """Prompts to train on."""

    teachers: Routing | None = Field(
        default=None,
        description="teacher or teachers with weights; default: every teacher whose card lists the domain",
    )
    share: Annotated[float, Field(gt=0.0, allow_inf_nan=False, strict=True)] = Field(
        default=1.0, description="how often prompts of this source are drawn, relative to the others"
    )
    response_field: str = Field(
        default="response", description="field with a ready answer, for phases on dataset text"
    )


class EvalSource(PromptSource):
    """Prompts to measure on; never trained on."""

    verifier: VerifierOrKind = Field(description="how an answer is checked; shorthand: its kind")
    expert: Name | None = Field(
        default=None, description="teacher to compare with; default: the domain's heaviest teacher"
    )
    limit: PositiveInt | None = Field(default=None, description="use the first N prompts only")


# --------------------------------------------------------------------------------------- rollout, phases


class LocalRollout(Strict):
    """Sampling inside the training process."""

    engine: Literal["local"] = Field(default="local", description="what writes the student's answers")
    samples_per_prompt: PositiveInt = Field(default=1, description="answers per prompt and round")
    temperature: Annotated[float, Field(gt=0.0, le=10.0, strict=True)] = Field(
        default=1.0, description="divides the logits that are sampled from"
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0, strict=True)] = Field(
        default=1.0, description="sample from the fewest tokens that hold this much probability"
    )
    max_new_tokens: PositiveInt = Field(default=256, description="longest answer, in tokens")
    stop: tuple[str, ...] = Field(default=(), description="texts that end an answer, beside the EOS token")
    batch_size: PositiveInt = Field(default=256, description="sequences decoded together")


class Ramp(Strict):
    """A value that moves linearly from `start` to `end` during the first `updates` of the phase."""

    start: Fraction = Field(description="value at the phase's first update")
    end: Fraction = Field(description="value from then on")
    updates: PositiveInt = Field(description="length of the ramp, in updates of the phase")


class TextMixture(Strict):
    """Some prompts are answered by the student, the others come from elsewhere."""

    on_policy_fraction: Fraction | Ramp = Field(description="share of prompts that the student answers")
    otherwise: Literal["teacher", "dataset"] = Field(description="where the other answers come from")


Text = Literal["student", "teacher", "dataset"] | TextMixture


class Balance(Strict):
    """Budgets between domains."""

    tokens: Literal["off", "equal"] | dict[Name, Weight] = Field(
        default="off",
        description="`equal` or target shares: weigh domains so that each gets its share of the loss, "
        "whatever the answers' lengths (Open-MOPD M1)",
    )


class Phase(Strict):
    """A stretch of training with one kind of text and one loss."""

    name: Name = Field(description="the phase's name, unique in the recipe")
    updates: PositiveInt = Field(description="optimizer updates")
    text: Text = Field(
        default="student",
        description="who writes the answers: student (on-policy), teacher, dataset, mixture",
    )
    loss: LossOrTerm = Field(description="what is minimised")
    prompts_per_round: PositiveInt = Field(default=64, description="prompts drawn and answered at a time")
    updates_per_round: PositiveInt = Field(default=1, description="optimizer updates made from one round")
    reduce: Literal["token", "sequence"] = Field(
        default="token", description="mean over all tokens, or over answers of each one's token mean"
    )
    balance: Balance = Field(default=Balance(), description="how domains share the loss")
    lr_scale: Weight = Field(default=1.0, description="multiplies the learning rate during the phase")


class Optimizer(Strict):
    """AdamW; the schedule spans all phases."""

    lr: Weight = Field(default=1e-6, description="peak learning rate")
    betas: tuple[Fraction, Fraction] = Field(
        default=(0.9, 0.95), description="decay of the running means of gradient and squared gradient"
    )
    eps: Annotated[float, Field(gt=0.0, allow_inf_nan=False, strict=True)] = Field(
        default=1e-8, description="added to the root of the mean squared gradient"
    )
    weight_decay: Weight = Field(
        default=0.0, description="decoupled decay of matrices; biases and norms have none"
    )
    warmup_updates: Annotated[int, Field(ge=0, strict=True)] = Field(
        default=0, description="updates during which the learning rate rises linearly to its peak"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="the learning rate after the warm-up, until the last update"
    )
    final_lr_fraction: Fraction = Field(
        default=0.0, description="where linear and cosine end, relative to lr"
    )
    clip_grad: Annotated[float, Field(gt=0.0, allow_inf_nan=False, strict=True)] | None = Field(
        default=1.0, description="largest gradient norm; null: no clipping"
    )


# ---------------------------------------------------------------------------------------------- the rest


class Evaluation(Strict):
    """Greedy accuracy of base, experts, weight average and student, after the run and by `mergeopd eval`."""

    prompts: Annotated[tuple[EvalSource, ...], Field(min_length=1)] = Field(
        description="what to measure on, one entry for each file"
    )
    max_new_tokens: PositiveInt | None = Field(
        default=None, description="longest answer, in tokens; default: the rollout's"
    )
    batch_size: PositiveInt = Field(default=256, description="sequences decoded together")


class Checkpoints(Strict):
    """When the run is saved."""

    every: PositiveInt = Field(default=50, description="updates between checkpoints")
    keep: PositiveInt = Field(default=3, description="newest checkpoints that are kept")


class Memory(Strict):
    """How much main memory may hold what could lie on disk."""

    hidden_states_gib: Annotated[float, Field(ge=0.0, allow_inf_nan=False, strict=True)] = Field(
        default=8.0, description="teachers' hidden states of a round; what is more goes to the run folder"
    )


class Reports(Strict):
    """What is written for people beside the display, metrics.jsonl and report.html."""

    tensorboard: Annotated[bool, Field(strict=True)] = Field(
        default=False,
        description="events for TensorBoard in the run's `tensorboard` folder; needs `mergeopd[tensorboard]`",
    )


class Recipe(Strict):
    """A merge: one student, its teachers, prompts and phases."""

    recipe: Literal[1] = Field(description="version of the recipe format")
    name: Name = Field(description="the merge's name, for people")
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = Field(
        default=0, description="start of all randomness"
    )
    threads: PositiveInt | None = Field(default=None, description="CPU threads; default: the machine's cores")
    student: Student = Field(description="the model that is trained")
    teachers: dict[Name, Teacher] = Field(
        min_length=1, description="the experts, each a card or the path of one, by the names used for routing"
    )
    prompts: Annotated[tuple[TrainSource, ...], Field(min_length=1)] = Field(
        description="what to train on, one entry for each file"
    )
    rollout: LocalRollout = Field(default=LocalRollout(), description="how answers are sampled")
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)] = Field(
        description="stretches of training, in order"
    )
    optimizer: Optimizer = Field(default=Optimizer(), description="how the student is updated")
    evaluation: Evaluation | None = Field(default=None, description="what is measured at the end")
    checkpoint: Checkpoints = Field(default=Checkpoints(), description="when the run is saved")
    allow_code: tuple[FunctionPath, ...] = Field(
        default=(), description="functions of yours that this recipe may import and call"
    )
    memory: Memory = Field(default=Memory(), description="what may stay in main memory")
    report: Reports = Field(default=Reports(), description="what is written for people")
    text_cache: str = Field(
        default=".mergeopd/texts", description="folder, shared by runs, of texts that teachers wrote"
    )
    output: str = Field(description="folder of the run")


# Where a short form may stand, and what it is short for. `extends` and `--set` write a short form out before
# they reach into it; `*` is any name or index.
SHORTHANDS: dict[tuple[str, ...], Callable[[Any], Any]] = {
    ("teachers", "*"): _card_shorthand,
    ("prompts", "*", "verifier"): _kind_shorthand,
    ("prompts", "*", "teachers"): _teachers_shorthand,
    ("evaluation", "prompts", "*", "verifier"): _kind_shorthand,
    ("phases", "*", "loss"): loss_shorthand,
    **{("phases", "*", "loss", term): weight_shorthand for term in PARAMETRIC_TERMS},
}
