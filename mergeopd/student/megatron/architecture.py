"""A model's sizes for Megatron and the grids that it fits, from config.json only (no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from mergeopd.errors import ModelError
from mergeopd.messages import joined
from mergeopd.models.experts import has_experts
from mergeopd.models.facts import ModelFacts, positive_int, read_config


@dataclass(frozen=True, slots=True)
class _Family:
    """Differences from Llama."""

    qkv_bias: bool = False
    qk_norm: bool = False
    # Defaults of transformers for a missing key: Llama's first generation has no groups, the others have
    # their own number.
    groups_are_heads: bool = False
    norm_eps: float = 1e-6
    # Key of the experts' size, and whether their weights are divided by their sum; None: as norm_topk_prob.
    expert_size_key: str = "moe_intermediate_size"
    renormalizes: bool | None = None


FAMILIES = MappingProxyType(
    {
        "llama": _Family(groups_are_heads=True),
        "qwen2": _Family(qkv_bias=True),
        "qwen3": _Family(qk_norm=True),
        "mixtral": _Family(norm_eps=1e-5, expert_size_key="intermediate_size", renormalizes=True),
        "qwen2_moe": _Family(qkv_bias=True),
        "qwen3_moe": _Family(qk_norm=True),
    }
)


@dataclass(frozen=True, slots=True)
class SplitProblem:
    """The reason why a model cannot be sharded: a key of `student.parallel`, and the values that work."""

    key: str
    message: str
    remedy: str


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """The experts of a mixture's layers.

    `renormalizes`: the weights of a token's experts are divided by their sum. `shared_size` is the size of an
    expert that computes every token, with its own gate; 0 if there is none.
    """

    count: int
    per_token: int
    size: int
    shared_size: int
    renormalizes: bool
    layers: frozenset[int]


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes of a decoder: rotary attention in query groups, RMSNorm before each part, SwiGLU.

    `num_groups` counts key-value heads, `ffn_size` the units of layers without experts.
    """

    facts: ModelFacts
    num_heads: int
    num_groups: int
    head_dim: int
    ffn_size: int
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool
    experts: ExpertSizes | None

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
        problems = _unmapped(config, family)
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
            norm_eps=float(config.get("rms_norm_eps", family.norm_eps)),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            experts=_expert_sizes(facts, config, family),
        )

    def split_problems(
        self, *, tensor: int, pipeline: int, expert: int = 1, sequence: bool = False
    ) -> list[SplitProblem]:
        """Return why this model cannot be sharded so, for any number of processes; empty if it can."""
        parts = {
            "tensor": {"attention heads": self.num_heads, "key-value heads": self.num_groups},
            "pipeline": {"layers": self.facts.num_layers},
        }
        if self.experts is None or len(self.experts.layers) < self.facts.num_layers:
            parts["tensor"]["feed-forward units"] = self.ffn_size
        if self.experts is not None:
            parts["expert"] = {"experts of a layer": self.experts.count}
            if self.experts.shared_size:
                parts["tensor"]["units of the shared expert"] = self.experts.shared_size
        sizes = {"tensor": tensor, "pipeline": pipeline, "expert": expert}
        problems = []
        for key, counts in parts.items():
            whole = [f"{count} {what}" for what, count in counts.items() if count % sizes[key]]
            if whole:
                common = math.gcd(*counts.values())
                fits = [str(n) for n in range(1, common + 1) if common % n == 0]
                message = f"{sizes[key]} does not divide the model's {joined(whole, 'and')}"
                problems.append(SplitProblem(key, message, f"use {joined(fits, 'or')}"))
        if self.experts is None and expert > 1:
            message = f"{self.facts.model_type} is not a mixture of experts"
            problems.append(SplitProblem("expert", message, "remove the key"))
        if self.experts is not None and tensor > 1 and not sequence:
            message = "a mixture of experts with `tensor` above 1 needs sequence parallelism"
            problems.append(SplitProblem("sequence", message, "use `sequence: true`"))
        return problems


def count_problem(world: int, *, tensor: int, pipeline: int, context: int = 1, expert: int = 1) -> str | None:
    """Return why `world` processes do not form a grid; None if they do."""
    sizes = f"tensor {tensor} x pipeline {pipeline}" + (f" x context {context}" if context > 1 else "")
    grids = {sizes: tensor * pipeline * context, f"expert {expert} x pipeline {pipeline}": expert * pipeline}
    for sizes, size in grids.items():
        if world % size:
            return f"{sizes} = {size} does not divide the number of processes, {world}"
    return None


def _expert_sizes(facts: ModelFacts, config: dict[str, Any], family: _Family) -> ExpertSizes | None:
    if facts.experts is None:
        return None
    path, renormalizes = facts.folder / "config.json", family.renormalizes
    shared = "shared_expert_intermediate_size"
    return ExpertSizes(
        count=facts.experts.count,
        per_token=facts.experts.per_token,
        size=positive_int(path, config, family.expert_size_key),
        shared_size=positive_int(path, config, shared) if facts.model_type == "qwen2_moe" else 0,
        renormalizes=bool(config.get("norm_topk_prob")) if renormalizes is None else renormalizes,
        layers=frozenset(
            layer for layer in range(facts.num_layers) if has_experts(facts.model_type, config, layer)
        ),
    )


def _unmapped(config: dict[str, Any], family: _Family) -> list[str]:
    """Return settings under which the mapped modules would compute something else."""
    problems = [
        f"{key}: true" for key in ("attention_bias", "mlp_bias", "use_sliding_window") if config.get(key)
    ]
    if config.get("model_type") == "mixtral" and config.get("sliding_window"):
        problems.append(f"sliding_window: {config['sliding_window']}")
    if not config.get("qkv_bias", True):
        problems.append("qkv_bias: false")
    if config.get("num_experts_per_tok") == 1 and (family.renormalizes or config.get("norm_topk_prob")):
        problems.append("one expert for each token, whose weight is always 1")
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
