"""A dense model's sizes for Megatron and the grids that it fits, from config.json only (no torch)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from mergeopd.errors import ModelError
from mergeopd.messages import joined
from mergeopd.models.facts import ModelFacts


@dataclass(frozen=True, slots=True)
class _Family:
    """Differences from Llama."""

    qkv_bias: bool = False
    qk_norm: bool = False
    # Defaults of transformers for a missing key: Llama's first generation has no groups, the others have
    # their own number.
    groups_are_heads: bool = False

    def key_value_heads(self, heads: int) -> dict[str, int]:
        return {"num_key_value_heads": heads} if self.groups_are_heads else {}


FAMILIES = MappingProxyType(
    {"llama": _Family(groups_are_heads=True), "qwen2": _Family(qkv_bias=True), "qwen3": _Family(qk_norm=True)}
)


@dataclass(frozen=True, slots=True)
class SplitProblem:
    """The reason why a model cannot be sharded: `tensor` or `pipeline`, and the values that work."""

    key: str
    message: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes of a dense decoder: rotary attention in query groups, RMSNorm before each part, SwiGLU.

    `num_groups` counts key-value heads. A mixture of experts would add its sizes here, replace the
    `_feed_forward` of `layout.py` and set the experts in `transformer_config` of `model.py`.
    """

    facts: ModelFacts
    num_heads: int
    num_groups: int
    head_dim: int
    ffn_size: int
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool

    @classmethod
    def read(cls, facts: ModelFacts) -> Architecture:
        """Read config.json beside `facts`. Raises ModelError for what is not mapped to Megatron."""
        path = facts.folder / "config.json"
        family = FAMILIES.get(facts.model_type)
        if family is None:
            known = ", ".join(FAMILIES)
            raise ModelError(
                f"{path}: {facts.model_type} is not mapped to Megatron (known: {known}); "
                "use student.backend: torch"
            )
        config = json.loads(path.read_text(encoding="utf-8"))
        problems = _unmapped(config)
        if problems:
            raise ModelError(
                f"{path}: not mapped to Megatron: {', '.join(problems)}; use student.backend: torch"
            )
        heads = _positive_int(config, "num_attention_heads", path)
        return cls(
            facts=facts,
            num_heads=heads,
            num_groups=_positive_int(
                {**family.key_value_heads(heads), **_given(config)}, "num_key_value_heads", path
            ),
            head_dim=_positive_int(
                {"head_dim": facts.hidden_size // heads, **_given(config)}, "head_dim", path
            ),
            ffn_size=_positive_int(config, "intermediate_size", path),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
        )

    def require(self, tensor: int, pipeline: int, world: int) -> None:
        """Raise ModelError when `tensor` x `pipeline` over `world` processes cannot hold this model."""
        problems = [f"{p.key}: {p.message}" for p in self.split_problems(tensor, pipeline)]
        count = count_problem(tensor, pipeline, world)
        if count is not None:
            problems.append(count)
        if problems:
            raise ModelError(f"{self.facts.folder}: {'; '.join(problems)}")

    def split_problems(self, tensor: int, pipeline: int) -> list[SplitProblem]:
        """Return why this model cannot be sharded so, for any number of processes; empty if it can."""
        parts = {
            "tensor": {
                "attention heads": self.num_heads,
                "key-value heads": self.num_groups,
                "feed-forward units": self.ffn_size,
            },
            "pipeline": {"layers": self.facts.num_layers},
        }
        problems = []
        for key, ways in (("tensor", tensor), ("pipeline", pipeline)):
            whole = [f"{count} {what}" for what, count in parts[key].items() if count % ways]
            if whole:
                common = math.gcd(*parts[key].values())
                fits = [str(n) for n in range(1, common + 1) if common % n == 0]
                message = f"{ways} does not divide the model's {joined(whole, 'and')}"
                problems.append(SplitProblem(key, message, f"use {joined(fits, 'or')}"))
        return problems


def count_problem(tensor: int, pipeline: int, world: int) -> str | None:
    """Return why `world` processes do not form a grid; None if they do."""
    if world % (tensor * pipeline) == 0:
        return None
    return (
        f"tensor {tensor} x pipeline {pipeline} = {tensor * pipeline} does not divide the number of "
        f"processes, {world}"
    )


def _given(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


def _positive_int(config: dict[str, Any], key: str, path: object) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise ModelError(f"{path}: {key} must be a positive integer, not {value!r}")
    return value


def _unmapped(config: dict[str, Any]) -> list[str]:
    """Return settings under which the mapped modules would compute something else."""
    problems = [
        f"{key}: true" for key in ("attention_bias", "mlp_bias", "use_sliding_window") if config.get(key)
    ]
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act: {config['hidden_act']}")
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        problems.append("layer_types other than full_attention")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    # These have fixed frequencies; others change them with the length, or scale the result.
    if kind not in ("default", "linear", "llama3"):
        problems.append(f"rope_type: {kind}")
    return problems
