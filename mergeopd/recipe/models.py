"""Models of a recipe: the student, its teachers, their cards."""

from __future__ import annotations

from math import lcm
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mergeopd.config.values import (
    DIGEST_PATTERN,
    Flag,
    Name,
    NonEmptyText,
    OpenFraction,
    PositiveInt,
    Revision,
    Strict,
    Weight,
)
from mergeopd.messages import joined
from mergeopd.models.residency import Residency
from mergeopd.recipe.bridges import BridgeOrKind
from mergeopd.recipe.served import Served
from mergeopd.recipe.text_api import TextApi

SET_BY_RENDERING = ("messages", "tools", "documents", "add_generation_prompt")


def _free_names(arguments: dict[str, Any]) -> dict[str, Any]:
    for name in arguments:
        if name in SET_BY_RENDERING:
            raise ValueError(f"'{name}' is set when a conversation is rendered: remove it")
    return arguments


TemplateArguments = Annotated[dict[str, Any], AfterValidator(_free_names)]


class Parallel(Strict):
    """Process grid of the student.

    With `backend: torch`, `shard` processes hold one replica (FSDP2), and each has micro-batches of its own.
    With `backend: megatron`, `tensor` x `pipeline` x `context` processes hold one; with `expert`, processes
    of one or more replicas divide the experts of a mixture.
    """

    data: PositiveInt | None = None
    """`torch`: number of replicas of the model; default: processes / `shard`. Sharded replicas
    (hybrid sharding) gather weights within one machine if `shard` is its number of GPUs"""
    shard: PositiveInt | None = None
    """`torch`: processes over which the weights, gradients and AdamW state of a replica are sharded; default:
    processes / `data`, or all processes. 1: every process has a whole replica"""
    tensor: PositiveInt = 1
    """`megatron`: tensor-parallel size: processes that share each weight matrix; must divide the attention
    heads, key-value heads and feed-forward size"""
    pipeline: PositiveInt = 1
    """`megatron`: pipeline-parallel size: number of model stages; must divide the number of layers"""
    context: PositiveInt = 1
    """`megatron`: context-parallel size: processes that share each sequence's positions, for long
    sequences"""
    expert: PositiveInt = 1
    """`megatron`: expert-parallel size of a mixture of experts: processes of a pipeline stage that divide
    each layer's experts, among all of the stage; must divide the number of experts"""
    sequence: Flag = False
    """`megatron`: sequence parallelism: split activations along the sequence outside the matrix products"""
    recompute: Flag = False
    """activation checkpointing: keep only each layer's input and recompute the layer in the backward pass;
    less memory, about a third more time"""
    layers: Literal["auto", "local", "transformer_engine"] = "auto"
    """`megatron`: layer implementation: Transformer Engine's or Megatron's own; `auto` uses Transformer
    Engine on a GPU where it can be imported"""

    @property
    def replica_size(self) -> int:
        """Number of processes that hold one replica."""
        return self.tensor * self.pipeline * self.context

    @property
    def smallest_world(self) -> int:
        """Number of processes of the smallest grid."""
        return lcm(self.tensor * self.context, self.expert) * self.pipeline


class Student(Strict):
    """The model to train."""

    model: str = Field(description="Hugging Face folder, or a hub id that is in the local cache")
    revision: Revision | None = Field(default=None, description="hub revision; only with a hub id")
    template: str | None = None
    """file with a Jinja chat template, also for the export; default: the tokenizer's own"""
    template_arguments: TemplateArguments = Field(default={})
    """variables of the chat template, such as `enable_thinking: false`"""
    end_tokens: Annotated[tuple[NonEmptyText, ...], Field(min_length=1)] | None = None
    """tokens that end its responses, also of the export; default: those of its generation_config.json and the
    special token that the chat template writes behind an assistant's turn"""
    backend: Literal["torch", "megatron"] = "torch"
    """training backend: `torch` (transformers' models; several processes shard them with FSDP2) or `megatron`
    (megatron-core: tensor and pipeline parallel)"""
    parallel: Parallel = Parallel()
    """process grid; it may change when a run is resumed"""
    packing: Flag = False
    """`torch`: put the sequences of a micro-batch into one row without padding, whose attention is masked by
    blocks; saves padding where lengths differ, but the attention of a row costs the square of its tokens"""
    compile: Flag = False
    """`torch`: compile the layers for training with torch.compile; the first updates take minutes"""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """precision of the forward pass; master weights, gradients and AdamW state are float32 (`float64` uses
    float64 for everything and is meant for tests)"""
    micro_batch_tokens: PositiveInt = 16384
    """maximum number of tokens (prompts, responses and padding) in one forward and backward pass"""
    kernel: Literal["auto", "torch", "triton"] = "auto"
    """operations of the exact loss between its matrix products: `torch`, or `triton` for a GPU; `auto` uses
    Triton on a GPU where it is installed. Top-k supports and bridges always use torch"""


class Canary(Strict):
    """Recorded sample for checking a teacher's identity, written by `mergeopd new teacher`."""

    prompt: str = Field(min_length=1, description="user message")
    response: str = Field(min_length=1, description="the teacher's own response")
    logprobs: tuple[float, ...] = Field(min_length=1)
    """log-probability of each response token, in nats"""


class TeacherCard(Strict):
    """A file in `teachers/` that describes a teacher, independent of any recipe."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["model"]}, {"required": ["api"]}]})

    card: Literal[1] = Field(description="version of the card format")
    name: str = Field(description="display name")
    model: str | None = None
    """Hugging Face folder, or a hub id that is in the local cache; either `model` or `api` is required"""
    api: TextApi | None = None
    """a model behind an OpenAI-compatible chat API, which writes text for `text: teacher`"""
    revision: Revision | None = Field(default=None, description="hub revision; only with a hub id")
    tokenizer: str | None = Field(default=None, description="tokenizer folder; default: the model's folder")
    template: str | None = None
    """file with a Jinja chat template; default: the tokenizer's chat template"""
    template_arguments: TemplateArguments = Field(default={})
    """variables of the chat template, such as `enable_thinking: true`"""
    domains: tuple[Name, ...] = ()
    """domains for which this teacher is used when a prompt source names no teachers"""
    licence: str | None = Field(default=None, description="licence of the weights; informational")
    fingerprint: Annotated[str, Field(pattern=DIGEST_PATTERN)] | None = None
    """digest of the checkpoint; other weights at this path are refused"""
    canary: Canary | None = None
    """sample that is compared before the teacher is used"""
    served: Served | None = None
    """servers that score for the teacher; `model` then needs the configuration, the tokenizer and, for hidden
    states, the tensor of the prediction head"""
    residency: Residency = "auto"
    """how its weights are in memory while it scores: whole (`resident`), or one layer after the other
    (`stream`), which takes the memory of two layers and cannot generate text; `auto`: whole where it fits"""

    @field_validator("residency")
    @classmethod
    def _has_weights(cls, residency: Residency, info: ValidationInfo) -> Residency:
        if residency != "auto" and (info.data.get("api") or info.data.get("served")):
            raise ValueError("servers have its weights, so this has no effect: remove it")
        return residency

    @model_validator(mode="after")
    def _one_model(self) -> TeacherCard:
        if self.model is None and self.api is None:
            raise ValueError(
                "no model: name a folder or hub id as `model`, or give `api` for one behind an API"
            )
        of_folder = self.model_fields_set & {
            "model",
            "revision",
            "tokenizer",
            "template",
            "template_arguments",
            "fingerprint",
            "canary",
        }
        if self.api is not None and of_folder:
            keys = joined([f"`{key}`" for key in sorted(of_folder)], "and")
            raise ValueError(f"a model behind an API has no folder: remove {keys}")
        return self


class SnapshotRule(Strict):
    """Student weights that are updated during the run, by `every` or `ema`.

    They change between rounds only.
    """

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["every"]}, {"required": ["ema"]}]})

    every: PositiveInt | None = None
    """take a new snapshot of the student every N updates, at the start of the next round; 1: at every
    round"""
    ema: OpenFraction | None = None
    """decay of an exponential moving average: after each round, `ema` x average + (1 - `ema`) x student"""

    @model_validator(mode="after")
    def _one_rule(self) -> SnapshotRule:
        if (self.every is None) == (self.ema is None):
            raise ValueError("give one of `every` and `ema`")
        return self


class TeacherRef(Strict):
    """A teacher in a recipe: another model by its card, or the student itself (self-distillation).

    Shorthand: the card's path.
    """

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["card"]}, {"required": ["student"]}]}
    )

    card: str | None = None
    """path of a teacher card; either `card` or `student` is required"""
    student: Literal["start"] | SnapshotRule | None = None
    """use the student as the teacher: `start` for its weights at the start of the run, or a rule that updates
    them during the run. In an evaluation, its weights at the start are measured"""
    weight: Weight = Field(default=1.0, description="factor on every prompt's weight for this teacher")
    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    """precision of the forward pass and of cached hidden states; default: float32, or the student's dtype for
    a self-teacher. For large teachers, use the checkpoint's dtype to avoid a copy"""
    quantize: Literal["int8", "float8"] | None = None
    """read linear layers with 8 bits per weight and a scale for each row: half of the bytes of bfloat16. The
    folder is converted once, into `text_cache`, and the divergence that this adds is measured and shown; the
    prediction head stays exact. Requires `pip install 'mergeopd[quantize]'`"""
    system: NonEmptyText | None = None
    """system message for this teacher only; replaces the one of the prompt, if it has one"""
    prompt: NonEmptyText | None = None
    """Jinja template that replaces the last user message for this teacher only. Variables: `prompt` (the
    message text), `reference` (the row's reference answer), and any other field that every row has.
    Evaluation ignores a template that shows more than `prompt`"""

    bridge: BridgeOrKind | None = None
    """loss for a teacher with another tokenizer: a bridge name, or a bridge with settings. It replaces the
    divergences and `sampled_reverse_kl` of the phase for this teacher, with the sum of their weights"""

    targets: NonEmptyText | None = None
    """folder with this teacher's targets for the text of the phases that it scores, which must not be the
    student's; `mergeopd targets` writes it. The teacher is then not loaded for training"""

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
        if isinstance(self.student, SnapshotRule) and self.targets is not None:
            raise ValueError("weights that follow the student have no fixed `targets`: remove the key")
        if self.quantize is not None and isinstance(self.student, SnapshotRule):
            raise ValueError("weights that follow the student have no folder to `quantize`: remove the key")
        if self.quantize is not None and self.targets is not None:
            raise ValueError("recorded `targets` are read in place of the weights: remove `quantize`")
        return self


def card_shorthand(value: Any) -> Any:
    """Expand a path to a teacher with that card."""
    return {"card": value} if isinstance(value, str) else value


Teacher = Annotated[TeacherRef, BeforeValidator(card_shorthand, json_schema_input_type=str | TeacherRef)]
