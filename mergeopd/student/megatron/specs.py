"""The layer in Megatron's terms, described once for its local modules and for Transformer Engine's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import nn

from mergeopd.errors import ModelError
from mergeopd.student.megatron.router import Router
from mergeopd.student.megatron.sequence import CausalAttention


class Norm(nn.RMSNorm):
    """Torch's RMSNorm with Megatron's mark for partial gradients under sequence parallelism.

    Megatron's own wrapper does not support sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LocalParts(LocalSpecProvider):  # type: ignore[misc]
    """Megatron's linear layers with torch's norms and attention."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return Norm

    def core_attention(self) -> type:
        return CausalAttention


# The modules of a layer's parts, by `student.parallel.layers`.
PARTS: dict[str, type[BackendSpecProvider]] = {"local": LocalParts, "transformer_engine": TESpecProvider}


def chosen(device: torch.device, layers: str) -> BackendSpecProvider:
    """Return the parts that `student.parallel.layers` means in this process.

    Raises ModelError when Transformer Engine's are requested but not available.
    """
    if device.type != "cuda":
        missing = "there is no GPU"
    else:
        missing = "" if _has_transformer_engine() else "transformer-engine cannot be imported"
    if layers == "transformer_engine" and missing:
        raise ModelError(
            f"student.parallel.layers: transformer_engine, but {missing} in this process; use auto or local"
        )
    return PARTS["local" if layers == "local" or missing else "transformer_engine"]()


def block(
    parts: BackendSpecProvider, num_experts: Sequence[int | None], *, qk_norm: bool
) -> TransformerBlockSubmodules:
    """Return the layers of a stage, each with its number of experts or None, and the stage's final norm.

    Where `parts` fuse a norm with the linear layer behind it, the norm's weight belongs to that layer
    (`layout.global_name`).
    """
    has_fused_norms = parts.fuse_layernorm_and_linear()
    norm = IdentityOp if has_fused_norms else parts.layer_norm(rms_norm=True)
    of_heads = parts.layer_norm(rms_norm=True, for_qk=True) if qk_norm else IdentityOp
    fused = parts.column_parallel_layer_norm_linear()
    attention = SelfAttentionSubmodules(
        linear_qkv=fused if has_fused_norms else parts.column_parallel_linear(),
        core_attention=parts.core_attention(),
        linear_proj=parts.row_parallel_linear(),
        q_layernorm=of_heads,
        k_layernorm=of_heads,
    )
    layers = [
        ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=norm,
                self_attention=ModuleSpec(SelfAttention, {"attn_mask_type": AttnMaskType.causal}, attention),
                self_attn_bda=get_bias_dropout_add,
                # A router stands before the experts' linear layers.
                pre_mlp_layernorm=norm if experts is None else parts.layer_norm(rms_norm=True),
                mlp=_feed_forward(parts, experts),
                mlp_bda=get_bias_dropout_add,
            ),
        )
        for experts in num_experts
    ]
    return TransformerBlockSubmodules(layers, parts.layer_norm(rms_norm=True))


def _feed_forward(parts: BackendSpecProvider, num_experts: int | None) -> ModuleSpec:
    """Return a feed-forward network, or experts: one after another in Megatron's own modules."""
    grouped = not isinstance(parts, LocalSpecProvider)
    spec = get_mlp_module_spec_for_backend(parts, num_experts, moe_grouped_gemm=grouped)
    if num_experts is not None:
        spec.submodules.router = Router
    return spec


def _has_transformer_engine() -> bool:
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    return True
