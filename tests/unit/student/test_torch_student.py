"""The reference student: masters, AdamW, export, checkpoint state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from states import HeldTensors, joined
from torch import Tensor
from transformers import AutoModelForCausalLM

from mergeopd.batch.micro_batch import MicroBatch
from mergeopd.errors import NumericsError, StorageError
from mergeopd.loss.divergence import ReverseKL
from mergeopd.loss.heads import Head, Hidden
from mergeopd.loss.objective import build_objective
from mergeopd.models.causal import response_hidden
from mergeopd.recipe.training import Optimizer
from mergeopd.student.adamw import AdamW
from mergeopd.student.torch import TorchStudent
from mergeopd.types import token_ids

CPU = torch.device("cpu")
VALID = 33
OBJECTIVE = build_objective({"reverse_kl": (ReverseKL(), 1.0)})
PROMPTS = tuple(map(token_ids, ((1, 2, 3), (4, 5))))
RESPONSES = tuple(map(token_ids, ((6, 7, 8), (9, 10, 11, 2))))
ADAM = {"betas": (0.9, 0.98), "eps": 1e-8}


def student_of(folder: Path, dtype: str = "float32", **optimizer: object) -> TorchStudent:
    return TorchStudent(folder, dtype=dtype, num_valid=VALID, optimizer=Optimizer(**optimizer), device=CPU)


def micro_batch(dtype: torch.dtype = torch.float32) -> MicroBatch:
    torch.manual_seed(0)
    n = sum(map(len, RESPONSES))
    teacher = Hidden(torch.randn(n, 8), Head(torch.randn(VALID, 8)))
    weight = torch.full((1, n), 1.0 / n, dtype=dtype)
    return MicroBatch((0, 1), ("t",), PROMPTS, RESPONSES, (teacher,), weight, torch.zeros(n, dtype=dtype))


def reference_loss(model: torch.nn.Module, micro: MicroBatch) -> Tensor:
    log_s = torch.cat(
        [
            model(torch.tensor([[*p, *r]])).logits[0, len(p) - 1 : -1, :VALID].float().log_softmax(-1)
            for p, r in zip(PROMPTS, RESPONSES, strict=True)
        ]
    )
    target = micro.targets[0]
    log_t = (target.hidden @ target.head.weight.T).log_softmax(-1)
    return (log_s.exp() * (log_s - log_t)).sum(-1).mean()


@pytest.mark.parametrize("tied", [True, False])
def test_updates_equal_plain_pytorch(make_model: Callable[..., Path], tied: bool) -> None:
    """Three updates with clipping and weight decay against transformers + autograd + torch.optim.AdamW."""
    folder = make_model("s", tied=tied)
    student = student_of(folder, weight_decay=0.1, clip_grad=0.05, **ADAM)
    model = AutoModelForCausalLM.from_pretrained(folder)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    spared = [p for p in model.parameters() if p.ndim <= 1]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}], **ADAM
    )
    micro = micro_batch()
    for lr in (1e-3, 3e-3, 2e-3):
        [stats] = student.accumulate_gradients([micro], OBJECTIVE)
        norm = student.optimizer_step(lr)
        loss = reference_loss(model, micro)
        loss.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        adamw.zero_grad()
        assert float(stats.loss.sum()) == pytest.approx(loss.item(), rel=1e-5)
        assert norm == pytest.approx(float(expected_norm), rel=1e-4)
    expected = dict(model.named_parameters())
    for name, parameter in joined(student.state()).items():
        if name.startswith("master."):
            assert torch.allclose(parameter, expected[name.removeprefix("master.")], atol=2e-6), name


def test_micro_batches_add_up(make_model: Callable[..., Path]) -> None:
    student = student_of(make_model("s"))
    whole = micro_batch()
    list(student.accumulate_gradients([whole], OBJECTIVE))
    expected = {name: g.clone() for name, g in student.gradients().items()}
    student.optimizer_step(0.0)
    start = 0
    for i, response in enumerate(RESPONSES):
        rows = slice(start, start + len(response))
        start += len(response)
        target = Hidden(whole.targets[0].hidden[rows], whole.targets[0].head)
        part = MicroBatch(
            (i,), ("t",), PROMPTS[i : i + 1], RESPONSES[i : i + 1], (target,),
            whole.teacher_weight_KN[:, rows], whole.nll_weight_N[rows],
        )  # fmt: skip
        list(student.accumulate_gradients([part], OBJECTIVE))
    for name, gradient in student.gradients().items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=2e-6), name


def test_bfloat16_keeps_small_updates_in_master_weights(make_model: Callable[..., Path]) -> None:
    """Updates far below bfloat16's resolution add up in the float32 masters and reach the weights at last."""
    student = student_of(make_model("s"), dtype="bfloat16", clip_grad=None)
    before = {n: t for n, t in joined(student.state()).items() if n.startswith("master.")}
    compute_before = {n: p.detach().clone() for n, p in student.body.named_parameters()}
    for _ in range(60):
        list(student.accumulate_gradients([micro_batch()], OBJECTIVE))
        student.optimizer_step(1e-5)
    after = joined(student.state())
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (after[f"master.{name}"] - before[f"master.{name}"]).abs()
    assert float(moved.median()) > 3e-4  # 60 x 1e-5, had every step the same sign
    for n, p in student.body.named_parameters():
        assert p.dtype == torch.bfloat16
        assert torch.equal(p, after[f"master.model.{n}"].to(torch.bfloat16))
    changed = dict(student.body.named_parameters())["layers.0.mlp.up_proj.weight"]
    assert not torch.equal(changed, compute_before["layers.0.mlp.up_proj.weight"])


def test_a_gradient_that_is_not_finite_changes_nothing(make_model: Callable[..., Path]) -> None:
    student = student_of(make_model("s"))
    before = joined(student.state())
    list(student.accumulate_gradients([micro_batch()], OBJECTIVE))
    student.gradients()["model.norm.weight"][2] = float("inf")
    with pytest.raises(NumericsError, match="weights are unchanged"):
        student.optimizer_step(1e-3)
    assert all(torch.equal(t, before[name]) for name, t in joined(student.state()).items())


def test_a_teacher_with_nan_is_named(make_model: Callable[..., Path]) -> None:
    micro = micro_batch()
    micro.targets[0].head.weight[3, 3] = float("nan")
    with pytest.raises(NumericsError, match=r"logits of target 0.*targets: 0 = t"):
        list(student_of(make_model("s")).accumulate_gradients([micro], OBJECTIVE))


def test_state_goes_on_bit_for_bit(make_model: Callable[..., Path]) -> None:
    folder = make_model("s")
    straight, first = student_of(folder, **ADAM), student_of(folder, **ADAM)
    for student in (straight, first):
        list(student.accumulate_gradients([micro_batch()], OBJECTIVE))
        student.optimizer_step(1e-3)
    second = student_of(folder, **ADAM)
    second.load_state(HeldTensors(joined(first.state())))
    for student in (straight, second):
        list(student.accumulate_gradients([micro_batch()], OBJECTIVE))
        student.optimizer_step(1e-3)
    expected, found = joined(straight.state()), joined(second.state())
    assert found.keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in found.items())


def test_state_of_another_model_is_refused(make_model: Callable[..., Path]) -> None:
    student = student_of(make_model("s"))
    other = student_of(make_model("o", layers=3))
    with pytest.raises(StorageError, match=r"not of this student: master\.model\.layers\.2"):
        student.load_state(HeldTensors(joined(other.state())))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_offloaded_optimizer_makes_the_same_updates(make_model: Callable[..., Path], dtype: str) -> None:
    """Its state is that of fused AdamW, up to rounding, and it continues from that of fused AdamW."""
    folder = make_model("s")
    plain = student_of(folder, dtype, weight_decay=0.1, clip_grad=0.05, **ADAM)
    offloaded = student_of(folder, dtype, weight_decay=0.1, clip_grad=0.05, offload=True, **ADAM)
    for lr in (1e-3, 3e-3, 2e-3):
        for student in (plain, offloaded):
            student.accumulate_gradients([micro_batch()], OBJECTIVE)
            student.optimizer_step(lr)
        expected, found = joined(plain.state()), joined(offloaded.state())
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-8)
        offloaded.load_state(HeldTensors(expected))
        assert all(torch.equal(t, expected[name]) for name, t in joined(offloaded.state()).items())


@pytest.mark.parametrize("tied", [True, False])
def test_export_loads_in_transformers_with_the_students_logits(
    make_model: Callable[..., Path], tmp_path: Path, tied: bool
) -> None:
    folder = make_model("s", tied=tied)
    (folder / "tokenizer.json").write_text("{}")
    student = student_of(folder)
    list(student.accumulate_gradients([micro_batch()], OBJECTIVE))
    student.optimizer_step(1e-2)
    student.export(tmp_path / "export")
    assert (tmp_path / "export" / "tokenizer.json").is_file()
    assert list((tmp_path / "export").glob("*.bin")) == []
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        with student.unsharded() as (body, head):
            expected = body(input_ids=ids).last_hidden_state @ head.weight.T
        assert torch.equal(loaded(ids).logits, expected)


def test_a_resumed_optimizer_lives_where_the_weights_do(make_model: Callable[..., Path]) -> None:
    """Fused AdamW wants its step counts on the device of the weights; a checkpoint is read onto the CPU."""
    folder = make_model("s")
    first, second = student_of(folder), student_of(folder)
    list(first.accumulate_gradients([micro_batch()], OBJECTIVE))
    first.optimizer_step(1e-3)
    masters = {name: p.detach().to("meta") for name, p in second._weights.masters.items()}
    second._weights.masters = second._weights._parameters = masters
    second._adamw = AdamW(masters, second._weights.shapes, Optimizer())
    second.load_state(HeldTensors(joined(first.state())))
    moments = [value for of_one in second._adamw._adamw.state.values() for value in of_one.values()]
    assert len(moments) == 3 * len(masters)
    assert {moment.device.type for moment in moments} == {"meta"}


def test_the_heads_gradient_is_summed_in_float32(make_model: Callable[..., Path]) -> None:
    """Of a bfloat16 student: what the kernel knows in float32 reaches the masters, micro-batch by micro-batch."""
    folder = make_model("s", tied=False)
    student, once = student_of(folder, dtype="bfloat16"), student_of(folder, dtype="bfloat16")
    list(once.accumulate_gradients([micro_batch()], OBJECTIVE))
    one = once.gradients()["lm_head.weight"]
    assert one.dtype == torch.float32
    assert not torch.equal(one, one.bfloat16().float())
    list(student.accumulate_gradients([micro_batch(), micro_batch()], OBJECTIVE))
    torch.testing.assert_close(student.gradients()["lm_head.weight"], 2 * one, rtol=1e-6, atol=0.0)
    # In float64 from the same rounded hidden states and weights.
    hidden = response_hidden(student.body, PROMPTS, RESPONSES, CPU).detach()
    with student.unsharded() as (_, head):
        weight = head.weight.detach().double().requires_grad_()
    target = micro_batch().targets[0]
    log_s = (hidden.double() @ weight.T)[:, :VALID].log_softmax(-1)
    log_t = (target.hidden @ target.head.weight.T).double().log_softmax(-1)
    (log_s.exp() * (log_s - log_t)).sum(-1).mean().backward()
    torch.testing.assert_close(one.double(), weight.grad, rtol=1e-5, atol=1e-7)
