"""Bodies and their weights against what transformers makes of the same folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mergeopd.errors import ModelError
from mergeopd.models.static_merges import static_merge, weight_average
from mergeopd.recipe.training import Optimizer
from mergeopd.student.torch import TorchStudent
from mergeopd.teacher.local import TeacherSource, TeacherStore
from mergeopd.teacher.protocol import TeacherSequence

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 7, 11, 13, 40, 3, 9, 22]])


def save(folder: Path, model_type: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A tiny model whose hidden size has no square root in bfloat16."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=48,
        hidden_size=88,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.to(dtype).save_pretrained(folder)
    return folder


@torch.no_grad()
def reference(folder: Path, dtype: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    return model.model(input_ids=IDS).last_hidden_state


def student_of(folder: Path, dtype: str) -> TorchStudent:
    return TorchStudent(folder, dtype=dtype, num_valid=48, optimizer=Optimizer(), device=CPU)


@torch.no_grad()
def student_hidden(student: TorchStudent) -> torch.Tensor:
    return student.body(input_ids=IDS, use_cache=False).last_hidden_state


def teacher_hidden(folder: Path, *dtypes: str) -> list[torch.Tensor]:
    store = TeacherStore({dtype: TeacherSource(folder, dtype, 48) for dtype in dtypes}, CPU)
    found = []
    for dtype in dtypes:
        with store.open(dtype) as teacher:
            sequence = TeacherSequence(IDS[0, :1].tolist(), [*IDS[0, 1:].tolist(), 0])
            [(_, states)] = teacher.hidden([sequence], 100)
            found.append(states)
    return found


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text", "apertus"])
def test_all_weights_have_the_requested_dtype(tmp_path: Path, model_type: str) -> None:
    """Folders in bfloat16: constants such as Gemma's scale of embeddings must not stay rounded to it."""
    folder = save(tmp_path / "m", model_type)
    teachers = teacher_hidden(folder, "float32", "bfloat16")
    for dtype, of_teacher in zip(("float32", "bfloat16"), teachers, strict=True):
        expected = reference(folder, dtype)
        student = student_of(folder, dtype)
        assert torch.equal(student_hidden(student), expected)
        assert torch.equal(of_teacher, expected[0])
        student.export(tmp_path / dtype)
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == dtype
        assert torch.equal(reference(tmp_path / dtype, dtype), expected)
    model = static_merge(folder, [folder], 48, CPU, weight_average())
    with torch.no_grad():
        found = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, reference(folder, "float32"), rtol=1e-6, atol=1e-6)


def test_saved_buffers_are_read(tmp_path: Path) -> None:
    """Apertus' activation has two constants in its checkpoints; others than the default must arrive."""
    folder = save(tmp_path / "m", "apertus")
    tensors = load_file(folder / "model.safetensors")
    assert "model.layers.0.mlp.act_fn.beta" in tensors
    plain = reference(folder, "float32")
    tensors["model.layers.0.mlp.act_fn.beta"] = torch.tensor(0.8, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    expected = reference(folder, "float32")
    assert not torch.equal(expected, plain)
    assert torch.equal(student_hidden(student_of(folder, "float32")), expected)
    assert torch.equal(teacher_hidden(folder, "float32")[0], expected[0])


def test_old_rotary_frequencies_are_ignored(tmp_path: Path) -> None:
    """Llama conversions before August 2023 have them, with whatever values; transformers ignores them."""
    folder = save(tmp_path / "m", "llama", torch.float32)
    expected = reference(folder, "float32")
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in (0, 1)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(reference(folder, "float32"), expected)
    assert torch.equal(student_hidden(student_of(folder, "float32")), expected)
    assert torch.equal(teacher_hidden(folder, "float32")[0], expected[0])
    save_file({**tensors, "model.layers.0.extra": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"has model\.layers\.0\.extra, which the model does not have"):
        student_of(folder, "float32")
