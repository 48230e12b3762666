"""Plans of streamed teachers against sizes of checkpoints, and against arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import mergeopd
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.facts import ModelFacts
from mergeopd.models.residency import BodySizes
from mergeopd.planner.residency import body_sizes
from mergeopd.planner.shapes import ModelShape
from mergeopd.reporting.estimate import Estimate

LAYER = 4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128
BODY = 36 * LAYER + 4096 + 151936 * 4096

# So few responses that copying the teacher to the device takes longer than its pass.
SHORT_PHASE = {"name": "merge", "updates": 10, "loss": "reverse_kl", "prompts_per_round": 16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_sizes_are_those_of_the_checkpoint(tmp_path: Path, model_type: str, dtype: str) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 0}
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "mlp_only_layers": [0],
    }
    own = experts | {"head_dim": 16} if model_type == "qwen3_moe" else {}
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **sizes, **heads, **own)
    ).save_pretrained(tmp_path)
    expected = BodySizes.of(ModelFacts.read(tmp_path), Checkpoint.open(tmp_path), dtype)
    assert body_sizes(ModelShape.read(tmp_path), dtype) == expected


def planned(write_recipe: Callable[..., Path], residency: str, hardware: str, **changes: Any) -> Estimate:
    student = {"model": "student", "dtype": "bfloat16", "micro_batch_tokens": 8192}
    path = write_recipe(student=student, **changes)
    config = path.parent / "student" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 2}))
    card = path.parent / "dense.yaml"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"residency": residency}))
    return mergeopd.plan(path, hardware=hardware, response_tokens=500)


def parts(result: Estimate) -> dict[str, float]:
    [memory] = [memory for memory in result.memory if memory.stage == "teachers"]
    return {part.name: part.num_bytes for part in memory.parts}


def test_streamed_memory_in_closed_form(write_recipe: Callable[..., Path]) -> None:
    """Two layers and the hidden states of a pass in place of the body; what is read is hidden."""
    whole, streamed = (planned(write_recipe, r, "h200x1") for r in ("resident", "stream"))
    tokens = 256 * (512 + 500)
    assert parts(whole)["teacher"] == 2 * BODY
    own = parts(streamed)
    assert own["teacher (layers)"] == own["teacher (layers being read)"] == 2 * 2 * LAYER
    assert own["teacher (states of a pass)"] == tokens * 4096 * 2
    [of_whole], [of_streamed] = whole.phases[0].teachers, streamed.phases[0].teachers
    assert (of_whole.how, of_streamed.how) == ("whole", "streamed")
    # The embedding is read by its rows that are used; and the head's tensor.
    rows = (of_streamed.bytes_read / 2 - 36 * LAYER - 4096) / 4096 - 151936
    assert 0.5 * 151936 < rows < 151936
    assert of_whole.bytes_read == 2 * (BODY + 151936 * 4096)
    assert any("teacher 'dense' is streamed" in note for note in streamed.notes)
    seconds = [
        next(stage.causes for stage in result.phases[0].stages if stage.name == "teachers")
        for result in (whole, streamed)
    ]
    # Only the first layer, read into pinned memory and copied, is not hidden behind 260,000 tokens.
    copied = 2 * BODY / 50e9
    saved = sum(seconds[0].values()) - sum(seconds[1].values())
    assert saved == pytest.approx(copied - 2 * copied / 36)


def test_passes_of_a_teacher_that_does_not_fit(write_recipe: Callable[..., Path]) -> None:
    """A teacher larger than `memory.teacher_gib` is streamed, as often as its hidden states need."""
    result = planned(write_recipe, "auto", "h200x1", memory={"teacher_gib": 3})
    room = 3 * 2**30 - (2 * 2 * LAYER + (64 << 20) + 8192 * (2 * 4096 + 3 * 12288) * 2)
    tokens, per_pass = 256 * 1012, room // (2 * 2 * 4096)
    times = -(-tokens // per_pass)
    [cost] = result.phases[0].teachers
    assert times > 1
    assert cost.how == f"streamed, {times} times"
    layers = times * 2 * (36 * LAYER + 4096)
    assert layers < cost.bytes_read < layers + (times + 1) * 2 * 151936 * 4096
    refused = planned(write_recipe, "resident", "h200x1", memory={"teacher_gib": 3})
    assert "held whole, it takes" in refused.obstacles[0]


def test_proposals_stream_what_does_not_fit(write_recipe: Callable[..., Path]) -> None:
    """Whole, a body of 28 GiB in float32 does not fit beside a student of 28 GiB in 60; streamed, it does."""
    result = planned(write_recipe, "resident", "cpu:8,60GiB", teachers={"dense": {"card": "dense.yaml"}})
    assert "held whole, it takes" in result.obstacles[0]
    assert "dense with `residency: stream` in the card" in result.obstacles[-1]
    assert result.fitted == ()
    slow = planned(write_recipe, "resident", "h200x1", phases=[SHORT_PHASE])
    [change] = [c for c in slow.changes if "teachers.dense.card.residency" in c.settings]
    streamed = planned(write_recipe, "stream", "h200x1", phases=[SHORT_PHASE])
    assert change.seconds == pytest.approx(streamed.seconds)
