"""The tensors that a checkpoint of each architecture must have, from config.json only, without torch.

Names are those of transformers' modules, and become those of published folders. Shapes are written in
letters: `d` hidden size, `f` intermediate size, `q` and `k` heads times head size of queries and of keys, `g`
the latter where the head size is always `d` over heads, `h` the head size, `e` experts, `m` and `s` the
intermediate sizes of an expert and of the one that all tokens use. Sizes that config.json leaves to the
defaults of transformers are not compared.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from typing import Any

from mergeopd.errors import ModelError
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.experts import Sizes, has_experts, published_shapes
from mergeopd.models.facts import EMBEDDING, HEAD, HEAD_BIAS, ModelFacts, read_config
from mergeopd.models.stored import stored_weights

# Buffers of old conversions; transformers computes them.
_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
# Constants of activation functions, which are saved with the weights but not trained.
_CONSTANT = re.compile(r"\.act_fn\.(beta|eps)$")

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_QKVO = (*_QKV, "self_attn.o_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_SHAPES = {
    "self_attn.q_proj": "q d",
    "self_attn.k_proj": "k d",
    "self_attn.v_proj": "k d",
    "self_attn.o_proj": "d q",
    "self_attn.dense": "d q",
    "self_attn.qkv_proj": "q+k+k d",
    "mlp.gate_proj": "f d",
    "mlp.up_proj": "f d",
    "mlp.down_proj": "d f",
    "mlp.gate_up_proj": "f+f d",
    "mlp.fc1": "f d",
    "mlp.fc2": "d f",
    "mlp.c_fc": "f d",
    "mlp.c_proj": "d f",
}
_EXPERTS = ("mlp.gate:e d", "mlp.experts.gate_up_proj:e m+m d", "mlp.experts.down_proj:e d m")
_WIDE_EXPERTS = ("mlp.gate:e d", "mlp.experts.gate_up_proj:e f+f d", "mlp.experts.down_proj:e d f")
_SHARED_EXPERT = (
    *("mlp.shared_expert.gate_proj:s d", "mlp.shared_expert.up_proj:s d", "mlp.shared_expert.down_proj:d s"),
    "mlp.shared_expert_gate:1 d",
)
_LLAMA = (*_QKVO, *_GATED, *_NORMS)
_UNGATED = (*_QKVO, "mlp.up_proj", "mlp.down_proj", *_NORMS)
_HEAD_NORMS = ("self_attn.q_norm:h", "self_attn.k_norm:h")
_AROUND_MLP = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
_AFTER = (*_QKVO, *_GATED, "post_attention_layernorm", "post_feedforward_layernorm")
_GLM = (*_QKVO, "mlp.gate_up_proj", "mlp.down_proj", *_NORMS)
_PHI = (*_QKV, "self_attn.dense", "mlp.fc1", "mlp.fc2", "input_layernorm")
_STARCODER = (*_QKVO, "mlp.c_fc", "mlp.c_proj", *_NORMS)
_FULL_NORMS = ("self_attn.q_norm:q", "self_attn.k_norm:k")

# Modules of a layer that have a weight.
_MODULES: Mapping[str, tuple[str, ...]] = {
    "apertus": (
        *(*_QKVO, "mlp.up_proj", "mlp.down_proj", *_HEAD_NORMS),
        *("attention_layernorm", "feedforward_layernorm"),
    ),
    "arcee": _UNGATED,
    "cohere": (*_QKVO, *_GATED, "input_layernorm"),
    "cohere2": (*_QKVO, *_GATED, "input_layernorm"),
    "exaone4": (*_AFTER, *_HEAD_NORMS),
    "gemma2": (*_LLAMA, *_AROUND_MLP),
    "gemma3_text": (*_LLAMA, *_AROUND_MLP, *_HEAD_NORMS),
    "glm": _GLM,
    "glm4": (*_GLM, "post_self_attn_layernorm", "post_mlp_layernorm"),
    "helium": (*_QKV, "self_attn.o_proj:d d", *_GATED, *_NORMS),
    "nemotron": _UNGATED,
    "olmo": (*_QKVO, *_GATED),
    "olmoe": (*_LLAMA, "self_attn.q_norm:d", "self_attn.k_norm:g"),
    "olmo2": (*_AFTER, *_FULL_NORMS),
    "olmo3": (*_AFTER, *_FULL_NORMS),
    "phi": _PHI,
    "phi3": ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", *_NORMS),
    **dict.fromkeys(("qwen3", "qwen3_moe"), (*_LLAMA, *_HEAD_NORMS)),
    "starcoder2": _STARCODER,
}
# What layers with experts have in place of `_GATED`.
_MIXTURES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("mixtral", "olmoe"), _WIDE_EXPERTS),
    "qwen2_moe": (*_EXPERTS, *_SHARED_EXPERT),
    "qwen3_moe": _EXPERTS,
}
# Modules of a layer that have a bias: always, or depending on a key of config.json with its default.
_BIASES: Mapping[str, tuple[str, ...]] = {
    "nemotron": _NORMS,
    "phi": _PHI,
    "qwen2": _QKV,
    "stablelm": _NORMS,
    "starcoder2": _NORMS,
}
_ATTENTION = ("attention_bias", False, _QKVO)
_MLP = ("mlp_bias", False, _GATED)
_MLP_UNGATED = ("mlp_bias", False, ("mlp.up_proj", "mlp.down_proj"))
_BIASES_BY_KEY: Mapping[str, tuple[tuple[str, bool, tuple[str, ...]], ...]] = {
    **dict.fromkeys(("apertus", "cohere", "cohere2", "gemma", "gemma2", "gemma3_text"), (_ATTENTION,)),
    **dict.fromkeys(("olmo", "olmo2", "olmo3", "olmoe", "qwen3", "qwen3_moe"), (_ATTENTION,)),
    **dict.fromkeys(("granite", "llama", "smollm3"), (_ATTENTION, _MLP)),
    **dict.fromkeys(("arcee", "nemotron"), (_ATTENTION, _MLP_UNGATED)),
    **dict.fromkeys(("glm", "glm4"), (("attention_bias", True, _QKV),)),
    "ernie4_5": (("use_bias", False, (*_QKVO, *_GATED)),),
    "helium": (("attention_bias", False, _QKV), _MLP),
    "qwen2_moe": (("qkv_bias", True, _QKV),),
    "seed_oss": (
        *(("attention_bias", True, _QKV), ("attention_out_bias", False, ("self_attn.o_proj",))),
        _MLP,
    ),
    "stablelm": (("use_qkv_bias", False, _QKV),),
    "starcoder2": (("use_bias", True, (*_QKVO, "mlp.c_fc", "mlp.c_proj")),),
}
_FINAL_NORM: Mapping[str, tuple[str, ...]] = {
    "olmo": (),
    "phi": ("model.final_layernorm.weight", "model.final_layernorm.bias"),
    **dict.fromkeys(("nemotron", "stablelm", "starcoder2"), ("model.norm.weight", "model.norm.bias")),
}
# Normalised queries and keys, whose shapes cannot be written in these letters.
_UNCOMPARED = re.compile(r"\.(q_norm|k_norm|q_layernorm|k_layernorm)\.|\.act_fn\.alpha_[pn]$")


def is_ignored(name: str) -> bool:
    """Whether transformers ignores a tensor of a checkpoint, such as computed rotary frequencies."""
    return bool(_IGNORED.search(name))


def is_weight(name: str) -> bool:
    """Whether a tensor of a checkpoint belongs to the model's parameters."""
    return not _IGNORED.search(name) and not _CONSTANT.search(name)


def parameter_shapes(facts: ModelFacts, config: Mapping[str, Any]) -> dict[str, Sizes]:
    """Return shapes of all parameters by name, without head and embedding; None is an unknown size."""
    sizes = _sizes(facts, config)
    final = _FINAL_NORM.get(facts.model_type, ("model.norm.weight",))
    shapes: dict[str, Sizes] = dict.fromkeys(final, (facts.hidden_size,))
    for layer in range(facts.num_layers):
        for name, letters in _layer_tensors(facts.model_type, config, layer):
            shapes[f"model.layers.{layer}.{name}"] = tuple(_size(part, sizes) for part in letters.split())
    return shapes


def expected_shapes(
    facts: ModelFacts, config: Mapping[str, Any], given: Container[str] = ()
) -> dict[str, Sizes]:
    """Return shapes of a published folder's tensors, without head and embedding; None is an unknown size.

    Parameters whose own names are `given` keep them.
    """
    return published_shapes(facts.model_type, parameter_shapes(facts, config), given)


def check_layout(facts: ModelFacts, checkpoint: Checkpoint, head: str = HEAD) -> None:
    """Compare a checkpoint's tensors, except for `head`, with those required by its config.json.

    Raises ModelError naming the first differences.
    """
    stored = stored_weights(facts, checkpoint)
    expected = expected_shapes(facts, read_config(facts.folder), stored)
    apart = {facts.embedding_name, facts.head_name, EMBEDDING, HEAD, HEAD_BIAS, head}
    uncompared = {name: None for name in checkpoint.tensors if _UNCOMPARED.search(name)}
    given = {name: own.shape for name, own in stored.items() if is_weight(name) and name not in apart}
    check_shapes(facts, given, expected, uncompared)


def check_shapes(
    facts: ModelFacts,
    given: Mapping[str, tuple[int, ...]],
    required: Mapping[str, Sizes],
    optional: Mapping[str, Sizes | None],
) -> None:
    """Compare shapes by tensor name; a size that is None, or a whole shape, is not compared.

    Raises ModelError naming the first differences.
    """
    known = {**optional, **required}
    problems = [f"has no {name}" for name in required if name not in given]
    problems += [f"has {name}, which the model does not have" for name in given if name not in known]
    for name, shape in given.items():
        sizes = known.get(name)
        if sizes is not None and not _agree(shape, sizes):
            shown = ["?" if size is None else size for size in sizes]
            problems.append(f"has {name} with shape {list(shape)}, the config says {shown}")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ModelError(
            f"{facts.folder}: weights and config.json are not of one model: "
            f"it {'; it '.join(problems[:3])}{more}; fetch both again"
        )


def _layer_tensors(model_type: str, config: Mapping[str, Any], layer: int) -> Iterator[tuple[str, str]]:
    """Yield names of parameters below a layer, and their shapes in letters."""
    modules, entries = {}, _MODULES.get(model_type, _LLAMA)
    if has_experts(model_type, config, layer):
        entries = (*(entry for entry in entries if entry not in _GATED), *_MIXTURES[model_type])
    for entry in entries:
        name, _, letters = entry.partition(":")
        modules[name] = letters or _SHAPES.get(name, "d")
    biases = set(_BIASES.get(model_type, ()))
    for key, default, names in _BIASES_BY_KEY.get(model_type, ()):
        if config.get(key, default):
            biases.update(names)
    if model_type == "stablelm" and config.get("use_parallel_residual"):
        del modules["post_attention_layernorm"]
    for module, letters in modules.items():
        yield module if ".experts." in module else f"{module}.weight", letters
        if module in biases:
            yield f"{module}.bias", letters.split()[0]


def _sizes(facts: ModelFacts, config: Mapping[str, Any]) -> dict[str, int | None]:
    def number(key: str) -> int | None:
        value = config.get(key)
        return value if type(value) is int and value > 0 else None

    heads, groups, head = (number(k) for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    if facts.model_type in ("phi", "stablelm"):
        head = None  # neither reads the key
    return {
        "d": facts.hidden_size,
        "f": number("intermediate_size"),
        "h": head,
        "e": facts.experts.count if facts.experts else None,
        "m": number("moe_intermediate_size"),
        "s": number("shared_expert_intermediate_size"),
        "1": 1,
        "q": heads * head if heads and head else None,
        "k": groups * head if groups and head else None,
        "g": groups * facts.hidden_size // heads if groups and heads else None,
    }


def _size(part: str, sizes: Mapping[str, int | None]) -> int | None:
    numbers = [sizes[letter] for letter in part.split("+")]
    return None if None in numbers else sum(number or 0 for number in numbers)


def _agree(shape: tuple[int, ...], expected: Sizes) -> bool:
    return len(shape) == len(expected) and all(
        size in (None, own) for own, size in zip(shape, expected, strict=True)
    )
