"""Mixtures of experts, from folders as published, against transformers' own models of these folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import FAMILIES, write_mixture
from safetensors.torch import load_file, save_file
from states import HeldTensors, joined
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from mergeopd.batch.micro_batch import MicroBatch
from mergeopd.engine.run import run_recipe
from mergeopd.errors import ModelError, UpdateLimitReached
from mergeopd.loss.divergence import ReverseKL
from mergeopd.loss.heads import Head, Hidden
from mergeopd.loss.objective import build_objective
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.experts import published
from mergeopd.models.facts import ModelFacts
from mergeopd.models.flops import ModelFlops
from mergeopd.models.layout import check_layout
from mergeopd.models.static_merges import static_merge, ties, weight_average, why_not
from mergeopd.planner.shapes import ModelShape
from mergeopd.preflight.inputs import preflight
from mergeopd.recipe.training import Optimizer
from mergeopd.student.torch import TorchStudent
from mergeopd.teacher.local import TeacherSource, TeacherStore
from mergeopd.teacher.protocol import TeacherSequence
from mergeopd.types import token_ids

CPU = torch.device("cpu")
VALID = 33
OBJECTIVE = build_objective({"reverse_kl": (ReverseKL(), 1.0)})
PROMPT, RESPONSE = (1, 2, 3), (6, 7, 8, 30, 12)
# A dense layer among those with experts, where the family has the key.
MIXED: dict[str, dict[str, Any]] = {"qwen3_moe": {"mlp_only_layers": [1]}}


def folder_of(tmp_path: Path, model_type: str, **options: Any) -> Path:
    return write_mixture(tmp_path / model_type, model_type, layers=3, **MIXED.get(model_type, {}), **options)


def student_of(folder: Path, dtype: str = "float32", **optimizer: Any) -> TorchStudent:
    return TorchStudent(folder, dtype=dtype, num_valid=VALID, optimizer=Optimizer(**optimizer), device=CPU)


def micro_batch() -> MicroBatch:
    torch.manual_seed(0)
    n = len(RESPONSE)
    teacher = Hidden(torch.randn(n, 8), Head(torch.randn(VALID, 8)))
    weight = torch.full((1, n), 1.0 / n)
    sequences = (token_ids(PROMPT),), (token_ids(RESPONSE),)
    return MicroBatch((0,), ("t",), *sequences, (teacher,), weight, torch.zeros(n))


def reference_loss(model: torch.nn.Module, micro: MicroBatch) -> Tensor:
    logits = model(torch.tensor([[*PROMPT, *RESPONSE]])).logits[0, len(PROMPT) - 1 : -1, :VALID]
    log_s, target = logits.log_softmax(-1), micro.targets[0]
    log_t = (target.hidden @ target.head.weight.T).log_softmax(-1)
    return (log_s.exp() * (log_s - log_t)).sum(-1).mean()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_losses_gradients_and_updates_are_those_of_transformers(tmp_path: Path, model_type: str) -> None:
    """No auxiliary loss of the router, although its coefficient is in config.json."""
    folder = folder_of(tmp_path, model_type)
    # With a small eps, AdamW would turn the rounding of gradients near zero into whole steps.
    adam = {"betas": (0.9, 0.98), "eps": 1e-3}
    student, micro = student_of(folder, weight_decay=0.1, clip_grad=None, **adam), micro_batch()
    model = AutoModelForCausalLM.from_pretrained(folder)
    parameters = dict(model.named_parameters())
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, 1e-2, **adam)
    for _ in range(2):
        [stats] = student.accumulate_gradients([micro], OBJECTIVE)
        loss = reference_loss(model, micro)
        loss.backward()
        assert float(stats.loss.sum()) == pytest.approx(loss.item(), rel=1e-5)
        gradients = student.gradients()
        assert gradients.keys() == parameters.keys()
        for name, gradient in gradients.items():
            scale = float(parameters[name].grad.abs().max())
            torch.testing.assert_close(gradient, parameters[name].grad, rtol=1e-4, atol=3e-5 * scale + 1e-9)
        student.optimizer_step(1e-2)
        adamw.step()
        adamw.zero_grad()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_student_teacher_and_export_compute_what_transformers_computes(
    tmp_path: Path, model_type: str, dtype: str
) -> None:
    folder, ids = folder_of(tmp_path, model_type), torch.tensor([[*PROMPT, *RESPONSE]])
    options = {"dtype": getattr(torch, dtype)}
    options |= {"experts_implementation": "eager"} if dtype == "float64" else {}
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        expected = reference.model(ids).last_hidden_state
        student = student_of(folder, dtype)
        assert torch.equal(student.body(input_ids=ids, use_cache=False).last_hidden_state, expected)
        store = TeacherStore({"t": TeacherSource(folder, dtype, VALID)}, CPU)
        with store.open("t") as teacher:
            [(_, states)] = teacher.hidden([TeacherSequence(PROMPT, RESPONSE)], 100)
            assert torch.equal(states, expected[0, len(PROMPT) - 1 : -1])
        student.export(tmp_path / "export")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "export", **options).eval()
        assert torch.equal(again.model(ids).last_hidden_state, expected)
    # As published, for engines: the same names, and the keys of config.json that they read.
    source = load_file(folder / "model.safetensors")
    for tensors in (load_file(tmp_path / "export" / "model.safetensors"), dict(student.folder_weights())):
        assert tensors.keys() == source.keys()
        assert all(torch.equal(tensors[name], source[name].to(getattr(torch, dtype))) for name in source)
    config = json.loads((folder / "config.json").read_text())
    exported = json.loads((tmp_path / "export" / "config.json").read_text())
    assert {key: exported.get(key) for key in config if "dtype" not in key} == {
        key: value for key, value in config.items() if "dtype" not in key
    }


def test_folders_with_the_names_of_modules_are_read(tmp_path: Path) -> None:
    for model_type in FAMILIES:
        folder = folder_of(tmp_path, model_type)
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.save_pretrained(tmp_path / f"{model_type}-fused", save_original_format=False)
        fused = load_file(tmp_path / f"{model_type}-fused" / "model.safetensors")
        assert "model.layers.0.mlp.experts.gate_up_proj" in fused
        student = student_of(tmp_path / f"{model_type}-fused")
        check_layout(ModelFacts.read(folder), Checkpoint.open(tmp_path / f"{model_type}-fused"))
        source = load_file(folder / "model.safetensors")
        assert all(torch.equal(tensor, source[name]) for name, tensor in student.folder_weights())


def test_checkpoints_resume_under_published_names(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "mixtral")
    first, micro = student_of(folder), micro_batch()
    for _ in range(2):
        list(first.accumulate_gradients([micro], OBJECTIVE))
        first.optimizer_step(1e-2)
    state = joined(first.state())
    names = load_file(folder / "model.safetensors").keys()
    kinds = ("master", "adamw.step", "adamw.exp_avg", "adamw.exp_avg_sq")
    assert state.keys() == {f"{kind}.{name}" for kind in kinds for name in names}
    second = student_of(folder)
    second.load_state(HeldTensors(state))
    for student in (first, second):
        list(student.accumulate_gradients([micro], OBJECTIVE))
        student.optimizer_step(1e-2)
    again = joined(second.state())
    assert all(torch.equal(tensor, again[name]) for name, tensor in joined(first.state()).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.2.mlp.experts.4.up_proj.weight"), "has no model.layers.2.mlp.experts.4.up"),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.6.up_proj.weight": torch.zeros(24, 32)}),
            "has model.layers.0.mlp.experts.6.up_proj.weight, which the model does not have",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.1.down_proj.weight": torch.zeros(32, 23)}),
            r"experts.1.down_proj.weight with shape \[32, 23\], the config says \[32, 24\]",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.gate.weight": torch.zeros(6, 32)}),
            "has model.layers.1.mlp.gate.weight, which the model does not have",
        ),
    ],
)  # fmt: skip
def test_damaged_folders(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    """Refused from the headers alone, and when the model is built."""
    folder = folder_of(tmp_path, "qwen3_moe")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        check_layout(ModelFacts.read(folder), Checkpoint.open(folder))
    with pytest.raises(ModelError, match=message):
        student_of(folder)


def test_static_merges_are_of_single_matrices(tmp_path: Path) -> None:
    folders = [write_mixture(tmp_path / str(i), "mixtral", seed=i) for i in range(3)]
    base, one, two = (load_file(folder / "model.safetensors") for folder in folders)

    def weights(merge: Any) -> Mapping[str, Tensor]:
        model = static_merge(folders[0], folders[1:], 37, CPU, merge)
        return {
            name: tensor
            for parameter, values in model.state_dict().items()
            for name, tensor in published("mixtral", parameter, values)
        }

    assert why_not(folders[0], folders[1:]) is None
    for name, tensor in weights(weight_average()).items():
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2)
    name = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    expected = ties(0.2, 1.0)(name, base[name], [one[name], two[name]])
    torch.testing.assert_close(weights(ties(0.2, 1.0))[name], expected)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_operations_are_those_of_active_experts(tmp_path: Path, model_type: str) -> None:
    """Against torch's count of the matrix products; transformers' loop over experts computes no more."""
    folder, T = folder_of(tmp_path, model_type), 12
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager"
    )
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(T).unsqueeze(0), use_cache=False)
    one = ModelFlops.read(folder)
    masked = one.per_position * (T * T - T * (T + 1) // 2)  # eager attention computes what the mask drops
    assert one.forward(T, T) + masked == counter.get_total_flops()
    shape = ModelShape.read(folder)
    assert shape.flops == one
    assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_a_run_with_mixtures_as_student_and_teachers(tmp_path: Path, write_job: Callable[..., Path]) -> None:
    """A teacher of the student's own past, too. Interrupted and resumed, it ends with the same weights."""
    teachers = {"one": {"card": "one.yaml"}, "two": {"card": "two.yaml"}, "past": {"student": {"ema": 0.9}}}
    sources = [
        {"source": "left.jsonl", "domain": "left", "teachers": {"one": 1.0, "two": 0.5}},
        {"source": "right.jsonl", "domain": "right", "teachers": {"two": 0.7, "past": 0.1}},
    ]
    recipe = write_job({"teachers": teachers, "prompts": sources})
    for seed, (name, model_type) in enumerate(
        {"base": "qwen3_moe", "one": "mixtral", "two": "olmoe"}.items()
    ):
        write_mixture(tmp_path / name, model_type, seed=seed, vocab=6, eos=4)
    preflight(recipe)
    run_recipe(recipe, [], max_updates=None, allowed_changes=())
    with pytest.raises(UpdateLimitReached):
        run_recipe(recipe, ["output=other"], max_updates=1, allowed_changes=())
    run_recipe(recipe, ["output=other"], max_updates=None, allowed_changes=())
    before, after, resumed = (
        load_file(tmp_path / name / "model.safetensors") for name in ("base", "run/export", "other/export")
    )
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], resumed[name]) for name in after)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any(".experts." in name for name in moved)
    assert any(".mlp.gate." in name for name in moved)
