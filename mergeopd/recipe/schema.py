"""The schema of recipes.

Field descriptions are user documentation: editors show them through the JSON Schema. A description that does
not fit beside its field is the docstring below it. Validators must raise ValueError, because other errors
would pass through pydantic and lose their location.

Values are strict: a quoted number is text, and a boolean is not a number. Paths are relative to the project
folder: the parent of the nearest folder named `recipes` (`teachers` for a card) above the file that contains
the path, otherwise that file's own folder. `~` is the home folder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from mergeopd.config.values import (
    Flag,
    FunctionPath,
    Name,
    NonEmptyText,
    Positive,
    PositiveInt,
    Revision,
    Strict,
    Weight,
    kind_shorthand,
)
from mergeopd.recipe.alarms import ALARMS, Action, Alarms, action_shorthand
from mergeopd.recipe.baselines import (
    StaticMerge,
    StaticMergeOrKind,
    WeightAverage,
    static_merge_shorthand,
)
from mergeopd.recipe.environments import EnvironmentOrKind
from mergeopd.recipe.inspection import InspectionSettings
from mergeopd.recipe.loss_terms import SHORT_TERMS, TEACHER_TERMS, loss_shorthand
from mergeopd.recipe.models import Student, Teacher, card_shorthand
from mergeopd.recipe.policy_terms import weight_shorthand
from mergeopd.recipe.rollout import AnyRollout, LocalRollout
from mergeopd.recipe.routing import Routing, teachers_shorthand
from mergeopd.recipe.trackers import Tracker, TrackerOrKind
from mergeopd.recipe.training import Optimizer, Phase, sources_shorthand
from mergeopd.recipe.verifiers import VerifierOrKind


class PromptSource(Strict):
    """Prompts of one domain: a file, or a split of a dataset."""

    source: str
    """a file (`.jsonl`, `.json` or `.csv`, also with `.gz`, or `.parquet`); a folder of such files, or of
    `save_to_disk`; or the id of a dataset on the Hugging Face hub (`openai/gsm8k`), read from the local
    cache. Folders and ids need the package `datasets`"""
    subset: NonEmptyText | None = None
    """subset (`config_name`) of a dataset; default: its default, or the only one"""
    split: NonEmptyText | None = None
    """split of a dataset; default: the only one"""
    revision: Revision | None = None
    """commit, branch or tag of a dataset on the hub; default: `main`"""
    download: Flag = False
    """fetch what the local cache lacks of a dataset on the hub; without it nothing is downloaded"""
    limit: PositiveInt | None = Field(default=None, description="use the first N rows only")
    domain: Name = Field(
        description="domain of the prompts; selects teachers, and groups budgets and reports"
    )
    verifier: VerifierOrKind | None = None
    """verifier that grades responses; shorthand: its kind"""
    prompt_field: str = "prompt"
    """field with the prompt: text, or a list of messages as chat templates take them (`role`, `content`,
    `tool_calls`, `reasoning_content`, ...)"""
    messages_field: NonEmptyText | None = None
    """field with a whole conversation, instead of `prompt_field` and `response_field`: messages up to the
    user's last one are the prompt, those after it the response. Also takes ShareGPT's `{from, value}`"""
    reference_field: str = "answer"
    """field with the reference answer that the verifier compares with"""
    tools_field: str = "tools"
    """field with the tools of a row: a list of JSON schemas of functions, or its JSON text"""
    environment: EnvironmentOrKind | None = None
    """environment that runs the tools that the model calls, turn by turn; shorthand: its kind. Default: a
    response is one turn"""

    @model_validator(mode="after")
    def _one_form(self) -> PromptSource:
        twice = {"prompt_field", "response_field"} & self.model_fields_set
        if self.messages_field is not None and twice:
            raise ValueError(f"`messages_field` takes the place of `{min(twice)}`: remove one of them")
        return self


class TrainSource(PromptSource):
    """Prompts to train on."""

    name: Name | None = None
    """name of the source, for `phases[].prompts` and in metrics; default: the file's name without suffix"""
    teachers: Routing | None = None
    """teacher, or teachers with weights; default: every teacher whose card lists the domain"""
    share: Positive = 1.0
    """how often prompts of this source are drawn, relative to the other sources"""
    response_field: str = "response"
    """field with a prepared response, for phases with `text: dataset`: text, or a trajectory (a list of
    messages from the assistant's first to its last, with those of tools and users between; only assistant
    messages are in the loss)"""
    text_field: NonEmptyText | None = None
    """field with a document, whose text is learned without a prompt in phases with `text: dataset`; takes the
    place of `prompt_field` and `response_field`"""
    max_tokens: Annotated[int, Field(ge=2, strict=True)] | None = None
    """for documents: longest sequence, in tokens; longer documents are split; default: 1024"""
    pack: Flag = False
    """for documents: join them, with an end token after each, and cut the whole into sequences of
    `max_tokens`"""

    @model_validator(mode="after")
    def _document_keys(self) -> TrainSource:
        if self.text_field is None:
            if self.max_tokens is not None or self.pack:
                raise ValueError("`max_tokens` and `pack` are for documents: name their `text_field`")
        elif self.verifier is not None:
            raise ValueError("a document has no response to verify: remove `verifier` or `text_field`")
        return self


Temperature = Annotated[float, Field(ge=0.0, allow_inf_nan=False, strict=True)]
TopP = Annotated[float, Field(gt=0.0, le=1.0, strict=True)]

NO_EXPERT = "none"


class EvalSource(PromptSource):
    """Held-out prompts for evaluation; never trained on."""

    name: Name | None = None
    """suite (row of the result) of these prompts; default: the domain. Sources of one name are one suite"""
    verifier: VerifierOrKind = Field(description="verifier that grades responses; shorthand: its kind")
    expert: Name | None = None
    """teacher to compare with; default: the teacher with the largest weight for the domain. `none` for a
    skill that no prompt trains: the result says what the student keeps of it, compared with the base"""
    max_new_tokens: PositiveInt | None = None
    """maximum response length, in tokens; default: that of `evaluation`"""
    samples: PositiveInt | None = Field(
        default=None, description="responses per prompt; default: that of `evaluation`"
    )
    temperature: Temperature | None = Field(
        default=None, description="sampling temperature; default: that of `evaluation`"
    )
    top_p: TopP | None = Field(
        default=None,
        description="total probability of the tokens sampled from; default: that of `evaluation`",
    )
    allow_overlap: Annotated[bool, Field(strict=True)] = False
    """evaluate although some of these prompts are also trained on; the result counts them"""


class Interim(Strict):
    """Accuracy during training: the student on a part of every suite, before the first update, every N
    updates and after the last. The weights are the same with and without it.
    """

    every: PositiveInt = Field(description="updates between measurements")
    prompts: PositiveInt = 64
    """number of prompts of each suite, evenly spaced, with one response to each; all if it has fewer"""


class Evaluation(Strict):
    """Accuracy of base, experts, static merges of the experts, and student, measured after the run and by
    `mergeopd eval`.
    """

    prompts: Annotated[tuple[EvalSource, ...], Field(min_length=1)]
    """evaluation sources, one entry per file or split"""
    max_new_tokens: PositiveInt | None = None
    """maximum response length, in tokens; default: `rollout.max_new_tokens`"""
    samples: PositiveInt = 1
    """responses per prompt; accuracy is the mean over them (avg@k), and pass@k is reported beside it. More
    than one needs a `temperature`"""
    temperature: Temperature = 0.0
    """sampling temperature; 0 is greedy decoding"""
    top_p: TopP = 1.0
    """sample from the most probable tokens with this total probability"""
    static_merges: tuple[StaticMergeOrKind, ...] = (WeightAverage(kind="weight_average"),)
    """merges of the experts' weights without training, to compare with; skipped where shapes differ"""
    all_experts: Annotated[bool, Field(strict=True)] = True
    """measure every expert on every domain, not only on its own"""
    batch_size: PositiveInt = Field(default=256, description="sequences decoded together")
    interim: Interim | None = None
    """accuracy during training as well; default: none"""

    @field_validator("static_merges")
    @classmethod
    def _once(cls, merges: tuple[StaticMerge, ...]) -> tuple[StaticMerge, ...]:
        kinds = [merge.kind for merge in merges]
        if twice := [kind for kind in kinds if kinds.count(kind) > 1]:
            raise ValueError(f"'{twice[0]}' is listed twice")
        return merges

    @model_validator(mode="after")
    def _can_differ(self) -> Evaluation:
        if self.samples > 1 and not self.temperature:
            raise ValueError(equal_responses(self.samples))
        return self


def equal_responses(samples: int) -> str:
    """Return the message for several responses without a temperature."""
    return f"{samples} greedy responses to a prompt are equal: set `temperature`, or `samples: 1`"


class Checkpoints(Strict):
    """How often the run is saved."""

    every: PositiveInt = Field(default=50, description="updates between checkpoints")
    keep: PositiveInt = Field(default=3, description="number of newest checkpoints to keep")
    best: Name | None = None
    """export the student of the update with the best interim accuracy, not that of the last: `accuracy` for
    the mean over suites, or a suite's name; of equal ones the latest. Requires `evaluation.interim`"""


class Memory(Strict):
    """Limits on memory for data that can be on disk."""

    hidden_states_gib: Weight = 8.0
    """GiB of main memory for one round's teacher hidden states; the rest is written to the run folder"""
    teacher_gib: Positive | None = None
    """GiB of memory, of the GPU if there is one, that a process may use for a local teacher's pass; larger
    teachers are streamed layer by layer. Default: nine tenths of what is free, less the student and the
    hidden states"""


class Reports(Strict):
    """Output besides the terminal display, metrics.jsonl and report.html."""

    trackers: tuple[TrackerOrKind, ...] = ()
    """experiment trackers, each once; shorthand: its kind. Not part of a run's identity: a resumed run may
    have others"""

    @field_validator("trackers")
    @classmethod
    def _once(cls, trackers: tuple[Tracker, ...]) -> tuple[Tracker, ...]:
        kinds = [tracker.kind for tracker in trackers]
        if twice := [kind for kind in kinds if kinds.count(kind) > 1]:
            raise ValueError(f"'{twice[0]}' is listed twice")
        return trackers


class Recipe(Strict):
    """A merge: one student, its teachers, prompts and training phases."""

    recipe: Literal[1] = Field(description="version of the recipe format")
    name: Name = Field(description="display name of the merge")
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0
    """seed of all random numbers"""
    threads: PositiveInt | None = None
    """number of CPU threads; default: the number of cores"""
    student: Student = Field(description="the model to train")
    teachers: dict[Name, Teacher] = Field(min_length=1)
    """the experts, by the names that `prompts` use; each entry is a mapping or the path of a card"""
    prompts: Annotated[tuple[TrainSource, ...], Field(min_length=1)]
    """training sources, one entry per file or split"""
    rollout: AnyRollout = Field(default=LocalRollout(), description="how responses are sampled")
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)] = Field(description="training phases, in order")
    optimizer: Optimizer = Field(default=Optimizer(), description="optimizer settings")
    evaluation: Evaluation | None = Field(default=None, description="evaluation after the run; default: none")
    alarms: Annotated[Alarms, BeforeValidator(action_shorthand, json_schema_input_type=Action | Alarms)] = (
        Alarms()
    )
    """signs that the run goes wrong, and what happens then; shorthand: the action of all"""
    checkpoint: Checkpoints = Field(default=Checkpoints(), description="how often the run is saved")
    allow_code: tuple[FunctionPath, ...] = ()
    """Python functions that this recipe may import and call"""
    memory: Memory = Field(default=Memory(), description="limit on main memory")
    report: Reports = Field(default=Reports(), description="additional reports")
    inspect: InspectionSettings = Field(
        default=InspectionSettings(), description="sample and thresholds of `mergeopd inspect`"
    )
    text_cache: str = ".mergeopd/texts"
    """folder for teacher responses, vocabulary maps and quantised teachers, shared between runs"""
    output: str = Field(description="run folder")


# Sections of named entries. null removes an entry of an extended recipe: `teachers: {math: null}`.
NAMED = ("teachers",)

# Paths that accept a short form, with the function that expands it; `*` is any name or index. `extends` and
# `--set` expand a short form before they change a value below it.
SHORTHANDS: dict[tuple[str, ...], Callable[[Any], Any]] = {
    ("teachers", "*"): card_shorthand,
    ("prompts", "*", "verifier"): kind_shorthand,
    ("prompts", "*", "teachers"): teachers_shorthand,
    ("evaluation", "prompts", "*", "verifier"): kind_shorthand,
    ("prompts", "*", "environment"): kind_shorthand,
    ("evaluation", "prompts", "*", "environment"): kind_shorthand,
    ("evaluation", "static_merges", "*"): static_merge_shorthand,
    ("report", "trackers", "*"): kind_shorthand,
    ("phases", "*", "prompts"): sources_shorthand,
    ("phases", "*", "teachers"): teachers_shorthand,
    ("phases", "*", "loss"): loss_shorthand,
    ("phases", "*", "correction"): kind_shorthand,
    **{("phases", "*", "loss", term): weight_shorthand for term in SHORT_TERMS},
    **{("phases", "*", "loss", term, "teachers"): teachers_shorthand for term in TEACHER_TERMS},
    ("alarms",): action_shorthand,
    **{("alarms", name): action_shorthand for name in ALARMS},
}
