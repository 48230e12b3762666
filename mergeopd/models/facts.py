"""Facts of a model's architecture, such as the form of its logits, read from config.json only.

For every known architecture `logits = softcap * tanh((scale * (hidden @ W.T + bias)) / softcap)`, where
`hidden` is the state after the final norm; by default scale is 1, and softcap and bias are absent. Only
decoder-only models, dense or mixtures of experts, whose checkpoint tensors have the module's own names or
those of `experts.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from mergeopd.errors import ModelError
from mergeopd.models.checkpoint import FLOATS, Checkpoint
from mergeopd.models.json_file import read_object
from mergeopd.models.quantization import Quantization, read_quantization

Weights = Literal["float", "readable", "any"]
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
HEAD_BIAS = "lm_head.bias"
QUANTISED_HEAD = (
    "{name!r} is quantised, and embedding and prediction head must not be: the loss needs the head exact; "
    "name a folder where they are not (most quantisation tools leave them out)"
)
_NO_HEAD = "the checkpoint has no tensor {name!r}, the prediction head"
# Data of a quantised weight, in place of `weight`.
_QUANTISED = ("weight_packed", "_weight_qdata")


@dataclass(frozen=True, slots=True)
class _Architecture:
    """Differences from Llama. Numbers are the defaults of transformers for keys missing in config.json."""

    tied: bool = False
    scale_key: str | None = None  # config key by which logits are multiplied
    divisor_key: str | None = None  # config key by which logits are divided
    scale_default: float = 1.0
    softcap_key: str | None = None
    softcap_default: float | None = None
    head_bias: bool = False
    experts: tuple[int, int] | None = None  # experts of a layer, and those that compute a token


_LIKE_LLAMA = (
    *("apertus", "arcee", "exaone4", "glm", "glm4", "helium", "llama", "ministral", "ministral3", "mistral"),
    *("nemotron", "olmo", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "seed_oss", "stablelm"),
)
_COHERE = _Architecture(tied=True, scale_key="logit_scale", scale_default=0.0625)
ARCHITECTURES = MappingProxyType(
    {
        **dict.fromkeys(_LIKE_LLAMA, _Architecture()),
        **dict.fromkeys(("ernie4_5", "gemma", "smollm3", "starcoder2"), _Architecture(tied=True)),
        **dict.fromkeys(("cohere", "cohere2"), _COHERE),
        "gemma2": _Architecture(tied=True, softcap_key="final_logit_softcapping", softcap_default=30.0),
        "gemma3_text": _Architecture(tied=True, softcap_key="final_logit_softcapping"),
        "granite": _Architecture(divisor_key="logits_scaling"),
        "phi": _Architecture(head_bias=True),
        "mixtral": _Architecture(experts=(8, 2)),
        "olmoe": _Architecture(experts=(64, 8)),
        "qwen2_moe": _Architecture(experts=(60, 4)),
        "qwen3_moe": _Architecture(experts=(128, 8)),
    }
)


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of a layer: how many there are, and how many of them compute a token."""

    count: int
    per_token: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts of a Hugging Face folder that need no weights.

    `vocab_rows` counts the head's rows, padding included; the tokenizer determines the true vocabulary.
    `tied` is the config's value: if True, the head is the tensor `embedding_name`, and `head_name` may be
    missing. `eos_ids` is empty when neither config.json nor generation_config.json has one. `experts` is None
    for a dense model, `quantization` for float weights.
    """

    folder: Path
    model_type: str
    hidden_size: int
    vocab_rows: int
    num_layers: int
    max_positions: int
    tied: bool
    logit_scale: float
    softcap: float | None
    eos_ids: tuple[int, ...]
    embedding_name: str = EMBEDDING
    head_name: str = HEAD
    head_bias_name: str | None = None
    experts: Experts | None = None
    quantization: Quantization | None = None

    @property
    def head_parameter(self) -> str:
        """Name of the parameter that is the head: the embedding where it is tied."""
        return self.embedding_name if self.tied else self.head_name

    @classmethod
    def read(cls, folder: Path, weights: Weights = "float") -> ModelFacts:
        """Read `folder`/config.json and generation_config.json; no code of the folder is executed.

        `weights` are those that the caller can use: not quantised, quantised in a format with a loader, or
        any, where it reads none but the prediction head. Raises ModelError when there is no config, it is
        damaged, its architecture unknown, or the weights are others.
        """
        path, config = folder / "config.json", read_config(folder)
        model_type = config.get("model_type")
        architecture = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
        if architecture is None:
            raise ModelError(_unknown(path, model_type, config))
        quantization = read_quantization(path, config) if weights == "readable" else None
        if config.get("quantization_config") and weights == "float":
            raise ModelError(
                f"{path}: the weights are quantised (quantization_config), and only teachers are read from "
                "such folders; name a folder with float weights"
            )
        tied = config.get("tie_word_embeddings", architecture.tied)
        if not isinstance(tied, bool):
            raise ModelError(f"{path}: tie_word_embeddings must be true or false, not {tied!r}")
        return cls(
            folder=folder,
            model_type=str(model_type),
            hidden_size=positive_int(path, config, "hidden_size"),
            vocab_rows=positive_int(path, config, "vocab_size"),
            num_layers=positive_int(path, config, "num_hidden_layers"),
            max_positions=positive_int(path, config, "max_position_embeddings"),
            tied=tied,
            logit_scale=_scale(path, config, architecture),
            softcap=_softcap(path, config, architecture),
            eos_ids=_eos_ids(folder, config),
            head_bias_name=HEAD_BIAS if architecture.head_bias else None,
            experts=_experts(path, config, architecture),
            quantization=quantization,
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a model folder. Raises ModelError when there is none."""
    config = read_object(folder / "config.json", ModelError)
    if config is None:
        there = "the folder has no config.json" if folder.is_dir() else "there is no such folder"
        raise ModelError(f"{folder}: {there}; name a Hugging Face model folder")
    return config


def head_tensor(facts: ModelFacts, checkpoint: Checkpoint) -> str:
    """Return the name of the head's tensor `[vocab_rows, hidden_size]`; mostly reads headers only.

    A tied head may be saved as embedding, as head, or as both when they are equal. Raises ModelError when the
    tensor is missing, when its shape is not that of the config, and when both exist and differ although the
    config ties them: transformers would untie them, other programs would not.
    """
    embedding, head = facts.embedding_name, facts.head_name
    if not facts.tied:
        name = head
    elif embedding in checkpoint.tensors and head in checkpoint.tensors:
        if not checkpoint.same_bytes(embedding, head):
            raise ModelError(
                f"{facts.folder}: config.json ties head and embedding, but {head!r} and {embedding!r} "
                "differ; set tie_word_embeddings to false in it, or save the model again"
            )
        name = embedding
    else:
        name = embedding if embedding in checkpoint.tensors else head
    if name not in checkpoint.tensors:
        module = name.removesuffix("weight")
        is_quantised = any(f"{module}{role}" in checkpoint.tensors for role in _QUANTISED)
        raise ModelError(
            f"{facts.folder}: " + (QUANTISED_HEAD if is_quantised else _NO_HEAD).format(name=name)
        )
    if checkpoint.tensors[name].dtype not in FLOATS:
        raise ModelError(f"{facts.folder}: {QUANTISED_HEAD.format(name=name)}")
    shape, expected = checkpoint.tensors[name].shape, (facts.vocab_rows, facts.hidden_size)
    if shape != expected:
        raise ModelError(
            f"{facts.folder}: {name!r} has shape {list(shape)}, config.json says {list(expected)}; "
            "config.json and the weights are not of one checkpoint"
        )
    return name


def _unknown(path: Path, model_type: Any, config: dict[str, Any]) -> str:
    known = ", ".join(sorted(ARCHITECTURES))
    if "auto_map" in config:
        return (
            f"{path}: model_type {model_type!r} runs code shipped with the weights (auto_map), which is "
            f"never executed; convert the checkpoint to an architecture of transformers. Known: {known}"
        )
    if model_type is None:
        return f"{path}: has no model_type; add one of: {known}"
    return f"{path}: unknown architecture {model_type!r}; known: {known}"


def positive_int(path: Path, config: dict[str, Any], key: str) -> int:
    """Return a setting of config.json. Raises ModelError when it is missing or not a positive integer."""
    if key not in config:
        raise ModelError(f"{path}: {key} is missing; fetch the model's own config.json")
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{path}: {key} must be a positive integer, not {value!r}")
    return value


def _positive(path: Path, key: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise ModelError(f"{path}: {key} must be a positive number, not {value!r}")
    return float(value)


def _scale(path: Path, config: dict[str, Any], architecture: _Architecture) -> float:
    key = architecture.scale_key or architecture.divisor_key
    if key is None:
        return 1.0
    value = _positive(path, key, config.get(key, architecture.scale_default))
    return value if architecture.scale_key else 1.0 / value


def _softcap(path: Path, config: dict[str, Any], architecture: _Architecture) -> float | None:
    if architecture.softcap_key is None:
        return None
    value = config.get(architecture.softcap_key, architecture.softcap_default)
    return None if value is None else _positive(path, architecture.softcap_key, value)


def _experts(path: Path, config: dict[str, Any], architecture: _Architecture) -> Experts | None:
    if architecture.experts is None:
        return None
    default, default_per_token = architecture.experts
    # Publishers write the first key, transformers 5 the second.
    key = next((key for key in ("num_experts", "num_local_experts") if key in config), None)
    count = default if key is None else positive_int(path, config, key)
    per_token = positive_int(
        path, {"num_experts_per_tok": default_per_token, **config}, "num_experts_per_tok"
    )
    if per_token > count:
        raise ModelError(f"{path}: num_experts_per_tok must be from 1 to {count}, not {per_token}")
    return Experts(count, per_token)


def _eos_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """Return ids of generation_config.json first, as in transformers' generate, without duplicates."""
    path = folder / "generation_config.json"
    value = (read_object(path, ModelError) or {}).get("eos_token_id")
    if value is None:
        path, value = folder / "config.json", config.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ModelError(f"{path}: eos_token_id must be a token id or a list of them, not {value!r}")
    return tuple(dict.fromkeys(ids))
