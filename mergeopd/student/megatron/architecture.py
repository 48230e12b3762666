"""A dense model's sizes for Megatron and the grids that it fits, from config.json only (no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from mergeopd.errors import ModelError
from mergeopd.messages import joined
from mergeopd.models.facts import ModelFacts, positive_int, read_config


@dataclass(frozen=True, slots=True)
class _Family:
    """Differences from Llama."""

    qkv_bias: bool = False
    qk_norm: bool = False
    # Defaults of transformers for a missing key: Llama's first generation has no groups, the others have
    # their own number.
    groups_are_heads: bool = False


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
        config = read_config(facts.folder)
        problems = _unmapped(config)
        if problems:
            raise ModelError(
                f"{path}: not mapped to Megatron: {', '.join(problems)}; use student.backend: torch"
            )
        heads = positive_int(path, config, "num_attention_heads")
        defaults = {"head_dim": facts.hidden_size // heads}
        if family.groups_are_heads:
            defaults["num_key_value_heads"] = heads
        config |= {key: value for key, value in defaults.items() if config.get(key) is None}
        return cls(
            facts=facts,
            num_heads=heads,
            num_groups=positive_int(path, config, "num_key_value_heads"),
            head_dim=positive_int(path, config, "head_dim"),
            ffn_size=positive_int(path, config, "intermediate_size"),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
        )

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


def count_problem(tensor: int, pipeline: int, context: int, world: int) -> str | None:
    """Return why `world` processes do not form a grid; None if they do."""
    size = tensor * pipeline * context
    if world % size == 0:
        return None
    sizes = f"tensor {tensor} x pipeline {pipeline}" + (f" x context {context}" if context > 1 else "")
    return f"{sizes} = {size} does not divide the number of processes, {world}"


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
