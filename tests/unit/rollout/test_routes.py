"""Routes of mixtures: recorded while responses are generated, and forced in training passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron_cases import REVERSE, Case, micro_batches, torch_student
from mixtures import FAMILIES, write_mixture
from transformers import AutoModelForCausalLM

from mergeopd.loss.heads import Head, Hidden
from mergeopd.recipe.training import Optimizer
from mergeopd.rollout.local import Generator, generate
from mergeopd.rollout.protocol import GenerationRequest
from mergeopd.student.layer_options import PassOptions
from mergeopd.student.torch import TorchStudent
from mergeopd.types import Sampling, token_ids

CPU = torch.device("cpu")
REQUESTS = [
    GenerationRequest(f"p:{i}", 0, token_ids([(7 * i + 3 * j) % 33 for j in range(2 + i % 4)]))
    for i in range(7)
]


def experts_of(model, ids: list[int]) -> np.ndarray:
    """The experts of each token in one pass, from transformers' router logits, `[tokens, layers, k]`."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]), output_router_logits=True).router_logits
    return torch.stack([own.topk(2).indices for own in logits], 1).sort(-1).values.numpy()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_routes_are_those_of_a_pass_over_the_whole_text(tmp_path: Path, model_type: str) -> None:
    """Batches with padding, of which responses drop out."""
    model = AutoModelForCausalLM.from_pretrained(write_mixture(tmp_path / "model", model_type)).eval()
    head = Head(model.lm_head.weight.detach(), num_valid=33)
    generator = Generator(model.base_model, head, set(range(0, 33, 6)), None, CPU)  # type: ignore[arg-type]
    how = Sampling(1.0, 1.0, 9)
    plain, recorded = (
        generate(generator, REQUESTS, how, seed=5, batch_size=4, records_routes=own, progress=lambda _: None)
        for own in (False, True)
    )
    assert [c.routes for c in plain] == [None] * len(plain)
    assert len({len(c.response_ids) for c in recorded}) > 2
    for request, before, completion in zip(REQUESTS, plain, recorded, strict=True):
        assert np.array_equal(completion.response_ids, before.response_ids)
        ids = [*request.prompt_ids.tolist(), *completion.response_ids.tolist()][:-1]
        assert completion.routes is not None
        assert completion.routes.dtype == np.uint8
        assert np.array_equal(np.sort(completion.routes, -1), experts_of(model, ids))


def with_routes(student: TorchStudent, case: Case) -> Case:
    """Routes of the student's routers now, for all tokens but the last of each response."""
    model = AutoModelForCausalLM.from_pretrained(
        case.folder, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    updates = []
    for micro in case.updates[0]:
        pairs = zip(micro.prompts, micro.responses, strict=True)
        routes = tuple(experts_of(model, [*p.tolist(), *r.tolist()][:-1]).astype(np.uint8) for p, r in pairs)
        targets = tuple(
            Hidden(t.hidden.double(), replace(t.head, weight=t.head.weight.double())) for t in micro.targets
        )
        weights = micro.teacher_weight_KN.double()
        updates.append(replace(micro, routes=routes, targets=targets, teacher_weight_KN=weights))
    return replace(case, updates=[updates])


def routers_of(student: TorchStudent) -> list[torch.nn.Module]:
    return [module for name, module in student.body.named_modules() if name.endswith("mlp.gate")]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_experts_are_replayed_when_the_routers_have_moved(tmp_path: Path, model_type: str) -> None:
    """The chosen experts exactly; the gradient of the routers is that of the loss, by finite differences."""
    folder = write_mixture(tmp_path / "model", model_type)
    generator = torch.Generator().manual_seed(1)
    case = Case(folder, REVERSE, [micro_batches(generator, 3)], Optimizer(), dtype="float64")
    student = torch_student(case)
    case = with_routes(student, case)
    routers = routers_of(student)
    with torch.no_grad():
        for router in routers:
            router.weight.add_(torch.randn(router.weight.shape, generator=generator, dtype=torch.float64))

    def loss(replayed: bool) -> float:
        batches = case.updates[0] if replayed else [replace(m, routes=()) for m in case.updates[0]]
        return sum(float(s.loss.sum()) for s in student.accumulate_gradients(batches, case.objective))

    free = loss(False)
    student.optimizer_step(0.0)
    replayed = loss(True)
    assert abs(replayed - free) > 1e-6
    name = next(name for name in student.gradients() if name.endswith("layers.0.mlp.gate.weight"))
    gradient = student.gradients()[name].clone()
    direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
    sides = []
    for step in (3e-4, -6e-4):
        with torch.no_grad():
            routers[0].weight.add_(step * direction)
        sides.append(loss(True))
    slope = float((gradient * direction).sum())
    assert slope != 0.0
    assert slope == pytest.approx((sides[0] - sides[1]) / 6e-4, rel=1e-2)


def test_replayed_routes_are_those_of_packed_rows(tmp_path: Path) -> None:
    folder = write_mixture(tmp_path / "model", "qwen3_moe")
    generator = torch.Generator().manual_seed(1)
    case = Case(folder, REVERSE, [micro_batches(generator, 3)], Optimizer(), dtype="float64")
    padded = torch_student(case)
    case = with_routes(padded, case)
    packed = TorchStudent(
        folder,
        dtype="float64",
        num_valid=case.num_valid,
        optimizer=Optimizer(),
        device=torch.device("cpu"),
        options=PassOptions(packing=True, recompute=True),
    )
    losses = []
    for student in (padded, packed):
        moved = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for router in routers_of(student):
                router.weight.add_(torch.randn(router.weight.shape, generator=moved, dtype=torch.float64))
        stats = student.accumulate_gradients(case.updates[0], case.objective)
        losses.append(sum(float(s.loss.sum()) for s in stats))
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    for name, gradient in packed.gradients().items():
        torch.testing.assert_close(gradient, padded.gradients()[name], rtol=1e-6, atol=1e-9)


def test_replayed_passes_use_the_recorded_experts(tmp_path: Path) -> None:
    folder = write_mixture(tmp_path / "model")
    generator = torch.Generator().manual_seed(1)
    case = Case(folder, REVERSE, [micro_batches(generator, 3)], Optimizer(), dtype="float64")
    student = torch_student(case)
    case = with_routes(student, case)
    experts = [module for name, module in student.body.named_modules() if name.endswith("mlp.experts")]
    seen: list[torch.Tensor] = []
    for module in experts:
        module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    with torch.no_grad():
        for router in routers_of(student):
            router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
    for micro in case.updates[0]:
        seen.clear()
        student.accumulate_gradients([micro], case.objective)
        used = torch.stack(seen, 1).unflatten(0, (len(micro.prompts), -1)).sort(-1).values.numpy()
        for own, routes in zip(used, micro.routes, strict=True):
            assert np.array_equal(own[: len(routes)], routes)
