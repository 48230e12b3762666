"""What may stand in a recipe and in a teacher card. Only what is implemented is accepted.

Descriptions here are user documentation: they become the JSON Schema that editors show.
Validators raise ValueError only; another type would escape pydantic and lose the place in the file.

Values are strict: a quoted number is text, a boolean is no number. Relative paths start from the project
folder: the parent of the nearest folder named `recipes` (`teachers` for a card) above the file that contains
the path, otherwise that file's own folder. `~` is the home folder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mergeopd.config.values import FunctionPath, Name, PositiveInt, Strict, Weight
from mergeopd.recipe.loss_terms import SHORT_TERMS, loss_shorthand
from mergeopd.recipe.models import Student, Teacher, card_shorthand
from mergeopd.recipe.policy_terms import correction_shorthand, weight_shorthand
from mergeopd.recipe.training import LocalRollout, Optimizer, Phase
from mergeopd.recipe.verifiers import VerifierOrKind, kind_shorthand

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
        default="response",
        description="field with a ready answer, for phases on dataset text: text, or a trajectory, that is a "
        "list of {role, content} messages from the assistant's first to its last; only the assistant's own "
        "are learned from",
    )


class EvalSource(PromptSource):
    """Prompts to measure on; never trained on."""

    verifier: VerifierOrKind = Field(description="how an answer is checked; shorthand: its kind")
    expert: Name | None = Field(
        default=None, description="teacher to compare with; default: the domain's heaviest teacher"
    )
    limit: PositiveInt | None = Field(default=None, description="use the first N prompts only")


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
        default=".mergeopd/texts",
        description="folder, shared by runs, of texts that teachers wrote, and of vocabulary maps",
    )
    output: str = Field(description="folder of the run")


# Sections of named entries. null removes an entry that an extended recipe has: `teachers: {math: null}`.
NAMED = ("teachers",)

# Where a short form may stand, and what it is short for. `extends` and `--set` write a short form out before
# they reach into it; `*` is any name or index.
SHORTHANDS: dict[tuple[str, ...], Callable[[Any], Any]] = {
    ("teachers", "*"): card_shorthand,
    ("prompts", "*", "verifier"): kind_shorthand,
    ("prompts", "*", "teachers"): _teachers_shorthand,
    ("evaluation", "prompts", "*", "verifier"): kind_shorthand,
    ("phases", "*", "loss"): loss_shorthand,
    ("phases", "*", "correction"): correction_shorthand,
    **{("phases", "*", "loss", term): weight_shorthand for term in SHORT_TERMS},
}
