"""ModelFacts against transformers itself: tiny random models of every known architecture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mergeopd.errors import ModelError
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.facts import ARCHITECTURES, Experts, ModelFacts, head_tensor

VOCAB = 48
TINY = {
    "hidden_size": 32,
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
# Values that matter: a transform of 1 or a cap far above the logits would hide a mistake.
OWN: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "gemma2": {"final_logit_softcapping": 1.5},
    "gemma3_text": {"final_logit_softcapping": 1.5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 3},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 3},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 16},
}


def save(folder: Path, model_type: str, **fields: Any) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(TINY | OWN.get(model_type, {}) | fields))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_head_and_transform_give_the_models_logits(tmp_path: Path, model_type: str) -> None:
    import torch

    from mergeopd.models.causal import parameter_parts

    model = save(tmp_path, model_type)
    facts, checkpoint = ModelFacts.read(tmp_path), Checkpoint.open(tmp_path)
    ids = torch.tensor([[5, 7, 11, 13, 40]])
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state
        expected = model(ids).logits
    logits = hidden @ checkpoint.read(head_tensor(facts, checkpoint)).T
    if facts.head_bias_name is not None:
        logits = logits + checkpoint.read(facts.head_bias_name)
    logits = logits * facts.logit_scale
    if facts.softcap is not None:
        logits = facts.softcap * torch.tanh(logits / facts.softcap)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert (model.lm_head.bias is not None) == (facts.head_bias_name is not None)
    assert model.get_input_embeddings().weight is model.get_parameter(facts.embedding_name)
    assert model.get_output_embeddings().weight is model.get_parameter(facts.head_name)
    # The store fills modules by these names.
    assert parameter_parts(facts, checkpoint).keys() <= model.state_dict().keys()
    assert facts.experts in (None, Experts(4, 3))
    assert facts.tied == model.config.tie_word_embeddings
    assert (facts.hidden_size, facts.vocab_rows, facts.num_layers, facts.max_positions) == (32, VOCAB, 2, 64)
    assert facts.eos_ids == (2, 3)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_missing_settings_have_the_defaults_of_transformers(tmp_path: Path, model_type: str) -> None:
    from transformers import AutoConfig

    needed = (
        "hidden_size",
        "vocab_size",
        "num_hidden_layers",
        "max_position_embeddings",
        "num_attention_heads",
    )
    config = {"model_type": model_type} | {key: TINY[key] for key in needed}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs, ours = AutoConfig.from_pretrained(tmp_path), ModelFacts.read(tmp_path)
    assert ours.tied == theirs.tie_word_embeddings
    assert ours.softcap == getattr(theirs, "final_logit_softcapping", None)
    assert ours.logit_scale == getattr(theirs, "logit_scale", 1.0) / getattr(theirs, "logits_scaling", 1.0)
    assert ours.eos_ids == ()
    if ours.experts is not None:
        counts = getattr(theirs, "num_local_experts", None) or theirs.num_experts
        assert ours.experts == Experts(counts, theirs.num_experts_per_tok)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(tmp_path: Path, model_type: str, tied: bool) -> None:
    save(tmp_path, model_type, tie_word_embeddings=tied)
    facts, checkpoint = ModelFacts.read(tmp_path), Checkpoint.open(tmp_path)
    assert facts.tied is tied
    assert head_tensor(facts, checkpoint) == ("model.embed_tokens.weight" if tied else "lm_head.weight")


def write(folder: Path, **fields: Any) -> Path:
    config = {"model_type": "qwen3"} | {k: v for k, v in TINY.items() if k != "eos_token_id"} | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    return folder


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (5, None, (5,)),
        ([5, 6, 5], None, (5, 6)),
        (5, {"eos_token_id": [7, 8]}, (7, 8)),
        (5, {"eos_token_id": 0}, (0,)),
        (5, {"temperature": 0.6}, (5,)),
        (None, {"eos_token_id": None}, ()),
    ],
)
def test_eos(tmp_path: Path, config: Any, generation: Any, expected: tuple[int, ...]) -> None:
    write(tmp_path, eos_token_id=config)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert ModelFacts.read(tmp_path).eos_ids == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba"}, "unknown architecture 'mamba'; known: apertus, arcee,"),
        ({"model_type": "absent"}, "has no model_type"),
        ({"model_type": "own", "auto_map": {"AutoModelForCausalLM": "m.Own"}}, "is never executed; convert"),
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, not 0"),
        ({"vocab_size": True}, "vocab_size must be a positive integer"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings must be true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id or a list"),
        ({"eos_token_id": -1}, "eos_token_id must be"),
        ({"model_type": "cohere", "logit_scale": None}, "logit_scale must be a positive number, not None"),
        ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling must be a positive number, not 0"),
        ({"model_type": "gemma2", "final_logit_softcapping": -1}, "final_logit_softcapping must be"),
        ({"model_type": "qwen3_moe", "num_experts": 4}, "num_experts_per_tok must be from 1 to 4, not 8"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ],
)
def test_bad_configs(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        ModelFacts.read(write(tmp_path, **fields))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not JSON"), ("[]", "must hold a JSON object"), (None, "no config.json")]
)
def test_damaged_configs(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        ModelFacts.read(tmp_path)


def test_a_known_type_with_auto_map_is_read_without_its_code(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("raise SystemExit('executed')")
    assert ModelFacts.read(write(tmp_path, auto_map={"AutoModelForCausalLM": "m.Own"})).model_type == "qwen3"


def test_heads_that_cannot_be_trusted(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    def check(rows: int, **tensors: torch.Tensor) -> str:
        save_file(tensors, tmp_path / "model.safetensors")
        facts = ModelFacts.read(write(tmp_path, tie_word_embeddings=True, vocab_size=rows))
        return head_tensor(facts, Checkpoint.open(tmp_path))

    weight = torch.randn(VOCAB, 32)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    assert check(VOCAB, **{embedding: weight, head: weight.clone()}) == embedding
    assert check(VOCAB, **{head: weight}) == head
    with pytest.raises(ModelError, match=r"ties head and embedding, but .* differ"):
        check(VOCAB, **{embedding: weight, head: weight + 1})
    with pytest.raises(ModelError, match=r"shape \[48, 32\], config.json says \[50, 32\]"):
        check(50, **{embedding: weight})
    with pytest.raises(ModelError, match=r"no tensor 'lm_head\.weight', the prediction head"):
        check(VOCAB, other=weight)
