"""Mixtures of experts in Megatron follow the torch student: experts dealt over ranks, on every grid."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron_cases import MIXED, REVERSE, Case, micro_batches, torch_student, trained, with_policy
from mixtures import write_mixture
from ranks import needs_megatron, run_ranks
from safetensors.torch import load_file, save_file
from states import HeldTensors, joined

from mergeopd.models.experts import published
from mergeopd.models.facts import ModelFacts
from mergeopd.planner.setup import shard_weights
from mergeopd.recipe.training import Optimizer
from mergeopd.student.megatron.architecture import Architecture

pytestmark = needs_megatron

WORKER = Path(__file__).with_name("megatron_worker.py")
DEADLINE_S = 300
OPTIMIZER = Optimizer(weight_decay=0.1, clip_grad=0.3, betas=(0.9, 0.98), eps=1e-6)
# Sizes and number of processes. Experts of TP2xEP2 are dealt to tensor-parallel neighbours; on four processes
# two have the same ones. Both processes of TP2 have all experts.
GRIDS = {
    "EP2": ({"expert": 2}, 2),
    "TP2xEP2": ({"tensor": 2, "expert": 2}, 2),
    "TP2xEP2xDP2": ({"tensor": 2, "expert": 2}, 4),
    "CP2xEP2": ({"context": 2, "expert": 2}, 2),
    "PP2xEP2": ({"pipeline": 2, "expert": 2}, 4),
    "TP2": ({"tensor": 2}, 2),
}
CASES = ("qwen3_moe", "qwen2_moe", "mixtral")
SHORT = ("EP2",)
LONG = tuple(pytest.param(grid, marks=pytest.mark.long) for grid in GRIDS if grid not in SHORT)
on_grids = pytest.mark.parametrize("grid", [*SHORT, *LONG])


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    settings = {
        "qwen3_moe": {"tied": True, "layers": 4, "mlp_only_layers": [1]},
        "qwen2_moe": {},
        "mixtral": {},
    }
    result = {}
    for name in CASES:
        model = write_mixture(folder / name, name, **settings[name], **EIGHT[name])
        generator = torch.Generator().manual_seed(len(result))
        updates = [micro_batches(generator, num) for num in (5, 4, 1)]
        result[name] = Case(model, REVERSE, updates, OPTIMIZER, lrs=(1e-3, 3e-3, 2e-3))
    student = torch_student(result["qwen3_moe"])
    updates = [with_policy(batches, student, generator) for batches in result["qwen3_moe"].updates]
    result["qwen3_moe"] = replace(result["qwen3_moe"], objective=MIXED, updates=updates, split=True)
    result["recomputed"] = replace(result["qwen3_moe"], recompute=True)
    updates = [with_routes(batches, generator) for batches in result["qwen3_moe"].updates]
    result["replayed"] = replace(result["qwen3_moe"], updates=updates)
    result["replayed recomputed"] = replace(result["replayed"], recompute=True)
    result["resumed"] = resumed(result["qwen3_moe"], folder / "state.safetensors")
    return result


EIGHT = {
    "qwen3_moe": {"num_experts": 8},
    "qwen2_moe": {"num_experts": 8},
    "mixtral": {"num_local_experts": 8},
}


def with_routes(batches, generator):
    """Random experts for all tokens but the last of each response, and none for every third response."""
    result = []
    for micro in batches:
        routes = []
        for prompt, response in zip(micro.prompts, micro.responses, strict=True):
            tokens = len(prompt) + len(response) - 1
            chosen = torch.rand(tokens, 3, 8, generator=generator).argsort(-1)[..., :2].numpy()
            routes.append(None if len(routes) % 3 == 2 else chosen.astype(np.uint8))
        result.append(replace(micro, routes=tuple(routes)))
    return result


def resumed(case, path):
    """The last two updates, from the torch student's state."""
    student = torch_student(case)
    student.accumulate_gradients(case.updates[0], case.objective)
    student.optimizer_step(case.lrs[0])
    save_file(joined(student.state()), path)
    return replace(case, updates=case.updates[1:], lrs=case.lrs[1:], state=path)


@pytest.fixture(scope="module")
def grids(cases, tmp_path_factory):
    """Results of the ranks of a grid by case, and the folder of their exports. Each grid is launched once."""
    made = {}

    def grid(name):
        if name not in made:
            sizes, world = GRIDS[name]
            folder = tmp_path_factory.mktemp(name)
            jobs = {}
            for case, settings in cases.items():
                (folder / case).mkdir()
                settings = replace(settings, sequence_parallel="tensor" in sizes)
                jobs[case] = settings.job(folder / case)
            torch.save(jobs, folder / "jobs")
            arguments = (str(folder / "jobs"), json.dumps({"tensor": 1, "pipeline": 1} | sizes))
            outputs = run_ranks(WORKER, world, folder, *arguments, deadline_s=DEADLINE_S)
            made[name] = folder, [torch.load(out, weights_only=False) for out in outputs]
        return made[name]

    return grid


@pytest.fixture(scope="module")
def references(cases):
    made = {}

    def reference(name):
        if name not in made:
            made[name] = trained(cases[name])
        return made[name]

    return reference


@pytest.mark.parametrize("case", [*CASES, "recomputed", "replayed", "replayed recomputed"])
@on_grids
def test_updates_follow_the_torch_student(grids, references, cases, grid, case):
    """Losses, norms and the first raw gradient; the weights after three updates with clipping and decay.

    Copies have different numbers of micro-batches, and in the last update one has none.
    """
    folder, ranks = grids(grid)
    expected = references({"recomputed": "qwen3_moe"}.get(case, case.removesuffix(" recomputed")))
    losses = [sum(rank[case]["losses"][i] for rank in ranks) for i in range(3)]
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    for rank in ranks:
        assert rank[case]["norms"] == pytest.approx(expected.norms, rel=1e-5)
        assert 0 not in rank[case]["observed"]  # not the empty micro-batches
    gradients = ranks[0][case]["gradients"]
    assert gradients.keys() == expected.gradients.keys()
    largest = max(float(g.abs().max()) for g in expected.gradients.values())
    for name, gradient in gradients.items():
        assert float((gradient - expected.gradients[name]).abs().max()) <= 1e-5 * largest, name
        assert float(expected.gradients[name].abs().max()) > 0, name
    start = load_file(cases[case].folder / "model.safetensors")
    actual = load_file(folder / case / "trained" / "model.safetensors")
    model_type = ModelFacts.read(cases[case].folder).model_type
    last = {n: w for p, values in expected.weights.items() for n, w in published(model_type, p, values)}
    assert actual.keys() == start.keys() == last.keys()
    moved = torch.stack([(last[n] - start[n]).norm() for n in start]).norm()
    apart = torch.stack([(last[n] - actual[n]).norm() for n in start]).norm()
    assert float(apart / moved) < 1e-4


@on_grids
def test_a_state_passes_between_torch_and_every_grid(grids, references, cases, grid):
    _, ranks = grids(grid)
    expected = references("qwen3_moe")
    assert all(rank["resumed"]["same state"] for rank in ranks)
    losses = [sum(rank["resumed"]["losses"][i] for rank in ranks) for i in range(2)]
    assert losses == pytest.approx(expected.losses[-2:], rel=1e-5)
    assert ranks[0]["resumed"]["norms"] == pytest.approx(expected.norms[-2:], rel=1e-5)
    student = torch_student(cases["qwen3_moe"])
    student.load_state(HeldTensors(joined(part for rank in ranks for part in rank["resumed"]["state"])))
    stats = student.accumulate_gradients(cases["qwen3_moe"].updates[0], cases["qwen3_moe"].objective)
    assert sum(float(s.loss.sum()) for s in stats) == pytest.approx(expected.next_loss, rel=1e-5)
    assert student.optimizer_step(1e-3) == pytest.approx(expected.next_norm, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
@on_grids
def test_untouched_weights_are_the_folders_bit_for_bit(grids, cases, grid, case):
    """As exported, and as the first rank streams them; each rank has its own experts only."""
    folder, ranks = grids(grid)
    expected = load_file(cases[case].folder / "model.safetensors")
    files = (folder / case / "untouched").glob("*.safetensors")
    exported = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for actual in (exported, ranks[0][case]["stream"]):
        assert actual.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


@pytest.mark.parametrize("case", CASES)
@on_grids
def test_a_plan_counts_the_weights_of_every_rank(grids, cases, grid, case):
    sizes, _ = GRIDS[grid]
    arch = Architecture.read(ModelFacts.read(cases[case].folder))
    for rank in grids(grid)[1]:
        own = rank[case]
        ways = (sizes.get("tensor", 1), sizes.get("pipeline", 1), sizes.get("expert", 1))
        assert own["num_weights"] == shard_weights(arch, *ways, own["stage"])
