"""Megatron's GPT for a Hugging Face folder; returns the hidden state after the final norm, no logits."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

from mergeopd.student.megatron.architecture import Architecture, ExpertSizes
from mergeopd.student.megatron.grid import Grid
from mergeopd.student.megatron.layout import expert_of, global_name, vocab_rows
from mergeopd.student.megatron.specs import block, chosen


class HiddenModel(GPTModel):  # type: ignore[misc]
    """A pipeline stage: returns `[s, b, d]`; the last stage returns the normed last hidden states.

    With sequence parallelism `s` is this rank's part of the sequence.
    """

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    @property
    def head_weight(self) -> Tensor:
        """This rank's rows of the head `[V_padded / tensor, d]`; last stage only."""
        is_tied = self.share_embeddings_and_output_weights
        weight: Tensor = self.shared_embedding_or_output_weight() if is_tied else self.output_layer.weight
        return weight

    @property
    def first_layer(self) -> int:
        """Number, in the whole model, of this stage's first layer."""
        return int(self.decoder.layers[0].layer_number) - 1

    @property
    def first_expert(self) -> int:
        """Number of this rank's first expert in every layer that has experts; else 0."""
        layers = [layer.mlp for layer in self.decoder.layers if isinstance(layer.mlp, MoELayer)]
        return int(layers[0].local_expert_indices[0]) if layers else 0


def build_model(
    arch: Architecture,
    grid: Grid,
    dtype: torch.dtype,
    device: torch.device,
    inv_freq: Tensor,
    *,
    recompute: bool,
    layers: str = "auto",
) -> HiddenModel:
    """Build this rank's stage with uninitialised weights. `inv_freq [head_dim / 2]`: rotary frequencies.

    `layers` is `student.parallel.layers` of a recipe. Raises ModelError when Transformer Engine's layers are
    requested but not available.
    """
    config = transformer_config(arch, grid, dtype, device, recompute=recompute)
    model = HiddenModel(
        config,
        block(chosen(device, layers), _num_experts(arch, grid), qk_norm=arch.qk_norm),
        vocab_size=vocab_rows(arch, grid.tensor),
        max_sequence_length=arch.facts.max_positions,
        pre_process=grid.stage == 0,
        post_process=grid.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=arch.facts.tied,
        position_embedding_type="rope",
        pg_collection=grid.groups,
    )
    model.rotary_pos_emb.inv_freq = torch.tensor(inv_freq.tolist(), device=device)
    model.to(device)
    if arch.experts is not None:
        for name, parameter in model.named_parameters():
            # Megatron sums the gradients of experts over the ranks that have them only if it divides them
            # over ranks, and not where tensor-parallel ranks have different tokens and the same experts.
            if expert_of(global_name(name, 0)) is not None:
                parameter.allreduce = False
    return model


def transformer_config(
    arch: Architecture, grid: Grid, dtype: torch.dtype, device: torch.device, *, recompute: bool
) -> TransformerConfig:
    """Return Megatron's configuration of a model."""
    layer_by_layer = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    return TransformerConfig(
        num_layers=arch.facts.num_layers,
        hidden_size=arch.facts.hidden_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_groups,
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        # The student must be the policy that sampled. Megatron's default is 0.1.
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        # Weights are read from files, so shards are allocated only. Megatron's own switch to skip
        # initialisation would also skip the marks that distinguish sharded from replicated parameters.
        init_method=_leave,
        output_layer_init_method=_leave,
        use_cpu_initialization=device.type == "cpu",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=grid.tensor,
        context_parallel_size=grid.context,
        pipeline_model_parallel_size=grid.pipeline,
        sequence_parallel=grid.sequence_parallel,
        # Micro-batches differ in shape: the only dispatcher that allows it, required even for a dense model.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # With a token count of 0, gradients are plain sums; denominators are part of the tokens' weights.
        calculate_per_token_loss=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **(layer_by_layer if recompute else {}),
        **({} if arch.experts is None else _expert_settings(arch, arch.experts, grid)),
    )


def _expert_settings(arch: Architecture, experts: ExpertSizes, grid: Grid) -> dict[str, Any]:
    """Return the settings of experts: as in transformers, without loss for balance and capacities."""
    return {
        "num_moe_experts": experts.count,
        "moe_router_topk": experts.per_token,
        "moe_ffn_hidden_size": experts.size,
        "moe_layer_freq": [int(layer in experts.layers) for layer in range(arch.facts.num_layers)],
        "moe_shared_expert_intermediate_size": experts.shared_size or None,
        "moe_shared_expert_gate": experts.shared_size > 0,
        # A softmax over the chosen experts is one over all of them, divided by the sum of the chosen.
        "moe_router_pre_softmax": not experts.renormalizes,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "expert_model_parallel_size": grid.expert,
        "expert_tensor_parallel_size": 1,
    }


def _num_experts(arch: Architecture, grid: Grid) -> list[int | None]:
    """Return the number of experts of each layer of this stage; None for a layer without."""
    per_stage = arch.facts.num_layers // grid.pipeline
    own = range(grid.stage * per_stage, (grid.stage + 1) * per_stage)
    experts = arch.experts
    return [None if experts is None or layer not in experts.layers else experts.count for layer in own]


def _leave(weight: Tensor) -> None:
    """Initialises nothing."""
