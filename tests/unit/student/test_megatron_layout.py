"""Which slices of a folder's tensors each rank of a grid holds, and which models and grids are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergeopd.errors import ModelError
from mergeopd.models.facts import ModelFacts
from mergeopd.student.megatron.architecture import Architecture, SplitProblem, count_problem
from mergeopd.student.megatron.layout import (
    Shard,
    expert_of,
    global_name,
    parameter_names,
    shard,
    tensor_shapes,
)

SIZES = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
MIXTURE = {
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 12,
    "num_local_experts": 6,
}


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Architecture]:
    def read(model_type: str = "qwen3", **options: object) -> Architecture:
        config = {"model_type": model_type, "head_dim": 6, **SIZES, **options}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return Architecture.read(ModelFacts.read(tmp_path))

    return read


def taken(name: str, arch: Architecture, tensor: int, rank: int, source: dict[str, Tensor]) -> Tensor:
    part = shard(name, arch, tensor, rank)
    pieces = [source[s.tensor].narrow(part.dim, s.start, s.stop - s.start) for s in part.slices]
    found = torch.cat(pieces, part.dim)
    return torch.cat([found, found.new_zeros(part.padding, *found.shape[1:])])


def made(arch: Architecture) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in tensor_shapes(arch).items()}


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_attention_keeps_each_query_group_together(
    read: Callable[..., Architecture], tensor: int, kind: str
) -> None:
    """Megatron's order written as a reshape: `[groups, (queries of the group, key, value), head_dim]`."""
    arch = read("qwen2")
    source = made(arch)
    q, k, v = (source[f"model.layers.2.self_attn.{x}_proj.{kind}"] for x in "qkv")
    whole = torch.cat([t.unflatten(0, (4, -1, 6)) for t in (q, k, v)], 1)
    for rank, expected in enumerate(whole.chunk(tensor)):
        found = taken(f"decoder.layers.2.self_attention.linear_qkv.{kind}", arch, tensor, rank, source)
        assert torch.equal(found, expected.flatten(0, 2))


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_feed_forward_and_vocabulary(read: Callable[..., Architecture], tensor: int) -> None:
    arch = read(tie_word_embeddings=False)
    source = made(arch)
    prefix = "model.layers.5.mlp."
    for rank in range(tensor):
        gate, up = (source[f"{prefix}{x}_proj.weight"].chunk(tensor)[rank] for x in ("gate", "up"))
        found = taken("decoder.layers.5.mlp.linear_fc1.weight", arch, tensor, rank, source)
        assert torch.equal(found, torch.cat([gate, up]))
        found = taken("decoder.layers.5.mlp.linear_fc2.weight", arch, tensor, rank, source)
        assert torch.equal(found, source[f"{prefix}down_proj.weight"].chunk(tensor, 1)[rank])
    head = torch.cat([taken("output_layer.weight", arch, tensor, r, source) for r in range(tensor)])
    assert torch.equal(head[:37], source["lm_head.weight"])
    assert head.shape[0] % tensor == 0
    assert not head[37:].any()


def test_a_rank_of_nothing_but_padding(read: Callable[..., Architecture]) -> None:
    arch = read(vocab_size=5, num_key_value_heads=8)
    found = [taken("embedding.word_embeddings.weight", arch, 8, rank, made(arch)) for rank in range(8)]
    assert [len(part) for part in found] == [1] * 8
    assert not torch.cat(found)[5:].any()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize(("tensor", "stages"), [(1, 1), (2, 1), (1, 3), (4, 2)])
def test_every_number_has_one_place(
    read: Callable[..., Architecture], model_type: str, tied: bool, tensor: int, stages: int
) -> None:
    """Over all ranks and stages each element is taken exactly once, copies counted once."""
    arch = read(model_type, tie_word_embeddings=tied)
    count = {name: torch.zeros(shape) for name, shape in tensor_shapes(arch).items()}
    for stage in range(stages):
        for name in parameter_names(arch, stage, stages):
            for rank in range(tensor):
                part = shard(name, arch, tensor, rank)
                if part.is_replicated and rank:
                    assert part == shard(name, arch, tensor, 0)
                    continue
                for s in part.slices:
                    count[s.tensor].narrow(part.dim, s.start, s.stop - s.start).add_(1)
    assert all(bool((c == 1).all()) for c in count.values())


def test_names_of_later_stages_and_of_transformer_engine() -> None:
    assert (
        global_name("decoder.layers.1.mlp.linear_fc2.weight", 4) == "decoder.layers.5.mlp.linear_fc2.weight"
    )
    fused = "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    assert global_name(fused, 3) == "decoder.layers.3.input_layernorm.weight"
    fused = "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
    assert global_name(fused, 0) == "decoder.layers.0.pre_mlp_layernorm.weight"
    assert global_name("decoder.final_layernorm.weight", 3) == "decoder.final_layernorm.weight"
    expert = "decoder.layers.5.mlp.experts.local_experts.7.linear_fc1.weight"
    assert global_name("decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight", 4, 4) == expert
    assert global_name("decoder.layers.1.mlp.experts.linear_fc1.weight3", 4, 4) == expert
    assert expert_of(expert) == 7
    assert expert_of("decoder.layers.5.mlp.router.weight") is None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"model_type": "phi3"}, "phi3 is not mapped to Megatron (known: llama, qwen2, qwen3, mixtral,"),
        (MIXTURE | {"norm_topk_prob": True, "num_experts_per_tok": 1}, "one expert for each token"),
        (MIXTURE | {"model_type": "qwen2_moe", "qkv_bias": False}, "qkv_bias: false"),
        ({"model_type": "mixtral", "sliding_window": 32}, "sliding_window: 32"),
        ({"attention_bias": True}, "attention_bias: true"),
        ({"mlp_bias": True, "hidden_act": "gelu"}, "mlp_bias: true, hidden_act: gelu"),
        ({"use_sliding_window": True}, "use_sliding_window: true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types other than full_attention"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type: dynamic"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type: yarn"),
        ({"num_key_value_heads": None}, "num_key_value_heads must be a positive integer, not None"),
    ],
)
def test_unmapped_architectures_are_refused(
    read: Callable[..., Architecture], options: dict[str, object], text: str
) -> None:
    with pytest.raises(ModelError) as caught:
        read(**{"model_type": "qwen3", **options})
    assert text in str(caught.value)


def test_the_first_llamas_have_a_key_for_every_head(read: Callable[..., Architecture]) -> None:
    """Their configs do not name key-value heads, and transformers takes the number of heads."""
    assert read("llama", num_key_value_heads=None).num_groups == 8
    assert read("llama").num_groups == 4


def test_grids_that_do_not_fit_are_reported_at_once(read: Callable[..., Architecture]) -> None:
    arch = read()
    assert arch.split_problems(tensor=2, pipeline=3) == []
    assert arch.split_problems(tensor=8, pipeline=4) == [
        SplitProblem(
            "tensor",
            "8 does not divide the model's 4 key-value heads and 20 feed-forward units",
            "use 1, 2 or 4",
        ),
        SplitProblem("pipeline", "4 does not divide the model's 6 layers", "use 1, 2, 3 or 6"),
    ]
    assert arch.split_problems(tensor=1, pipeline=1, expert=2) == [
        SplitProblem("expert", "qwen3 is not a mixture of experts", "remove the key")
    ]


def test_grids_of_a_mixture(read: Callable[..., Architecture]) -> None:
    """Its own feed-forward size counts only where a layer has no experts."""
    arch = read(**MIXTURE)
    assert arch.split_problems(tensor=4, pipeline=3, expert=6, sequence=True) == []
    assert arch.split_problems(tensor=2, pipeline=1, expert=4) == [
        SplitProblem("expert", "4 does not divide the model's 6 experts of a layer", "use 1, 2, 3 or 6"),
        SplitProblem(
            "sequence",
            "a mixture of experts with `tensor` above 1 needs sequence parallelism",
            "use `sequence: true`",
        ),
    ]
    sizes = {"tensor": 4, "pipeline": 1, "sequence": True}
    assert read(**MIXTURE | {"intermediate_size": 10}).split_problems(**sizes) == []
    [problem] = read(**MIXTURE | {"intermediate_size": 10, "mlp_only_layers": [3]}).split_problems(**sizes)
    assert problem.message == "4 does not divide the model's 10 feed-forward units"
    assert count_problem(8, tensor=4, pipeline=2, expert=2) is None
    assert count_problem(6, tensor=3, pipeline=2, expert=2) == (
        "expert 2 x pipeline 2 = 4 does not divide the number of processes, 6"
    )


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2_moe", "mixtral"])
@pytest.mark.parametrize(("tensor", "stages", "ways"), [(1, 1, 1), (2, 1, 3), (2, 3, 2)])
def test_every_number_of_a_mixture_has_one_place(
    read: Callable[..., Architecture], model_type: str, tensor: int, stages: int, ways: int
) -> None:
    dense = {} if model_type == "mixtral" else {"mlp_only_layers": [2]}
    arch = read(**MIXTURE | {"model_type": model_type} | dense)
    count = {name: torch.zeros(shape) for name, shape in tensor_shapes(arch).items()}
    for stage in range(stages):
        for name in parameter_names(arch, stage, stages, range(0)):
            parts = [shard(name, arch, tensor, rank) for rank in range(tensor)]
            for part in parts[:1] if parts[0].is_replicated else parts:
                add(count, part)
        for way in range(ways):
            own = range(6 * way // ways, 6 * (way + 1) // ways)
            for name in parameter_names(arch, stage, stages, own):
                if expert_of(name) is not None:
                    add(count, shard(name, arch, tensor, 0))
    assert all(bool((c == 1).all()) for c in count.values())
    assert ("model.layers.2.mlp.gate_proj.weight" in count) == bool(dense)


def add(count: dict[str, Tensor], part: Shard) -> None:
    for s in part.slices:
        count[s.tensor].narrow(part.dim, s.start, s.stop - s.start).add_(1)


def test_the_layout_imports_neither_torch_nor_megatron() -> None:
    code = (
        "import sys, mergeopd.student.megatron.architecture, mergeopd.student.megatron.layout\n"
        "assert not {'torch', 'transformers', 'megatron'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
