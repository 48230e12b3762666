"""The torch student, sharded over gloo ranks, follows the same student in one process: numbers, states, errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron_cases import (
    MIXED,
    REVERSE,
    Case,
    micro_batches,
    torch_student,
    trained,
    with_policy,
    write_dense,
)
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from states import HeldTensors, joined
from transformers import AutoModelForCausalLM

from mergeopd.recipe.training import Optimizer
from mergeopd.student.loss import Measured

WORKER = Path(__file__).with_name("sharded_worker.py")
DEADLINE_S = 300
# shard, processes
GRIDS = {"2": (2, 2), "4": (4, 4), "2x2": (2, 4), "replicas": (1, 2)}
OPTIMIZER = Optimizer(weight_decay=0.1, clip_grad=0.3, betas=(0.9, 0.98), eps=1e-6)
# Family, head and loss.
SHORT = ("qwen3 tied mixed", "llama untied reverse")
# Experts that no grid divides; on four ranks one has none of them.
MIXTURE = "qwen3_moe untied mixed"
FAMILIES = (
    *SHORT,
    MIXTURE,
    "qwen2 tied reverse",
    "mistral untied mixed",
    "gemma2 tied reverse",
    "gemma3_text tied mixed",
    "olmo2 untied mixed",
    "phi untied reverse",
)
RESUMED = {"resumed": SHORT[0], "resumed mixture": MIXTURE}
CASES = {
    "2": (*FAMILIES, "bfloat16"),
    "4": (*SHORT, MIXTURE, *RESUMED),
    "2x2": (*SHORT, "bfloat16", "resumed", "failures"),
    "replicas": (SHORT[0], "resumed"),
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHORT_GRID = "2x2"  # in `make test`; the others follow in `make test-dist`


def on_grids(*cases):
    """Parametrize with these cases on the grids that run them."""
    return pytest.mark.parametrize(
        ("grid", "case"),
        [
            pytest.param(grid, case, marks=() if grid == SHORT_GRID else pytest.mark.long)
            for grid in GRIDS
            for case in cases
            if case in CASES[grid]
        ],
    )


def resumed(case, path):
    """Reduce `case` to its last two updates, resumed from the state of one process, with moments on the host."""
    student = torch_student(case)
    for batches, lr in zip(case.updates[:-2], case.lrs[:-2], strict=True):
        student.accumulate_gradients(batches, case.objective)
        student.optimizer_step(lr)
    save_file(joined(student.state()), path)
    offloaded = case.optimizer.model_copy(update={"offload": True})
    return replace(case, updates=case.updates[-2:], lrs=case.lrs[-2:], state=path, optimizer=offloaded)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    result = {}
    for name in FAMILIES:
        family, head, loss = name.split()
        experts = EXPERTS if name == MIXTURE else {}
        model = write_dense(folder / name.replace(" ", "_"), family, tied=head == "tied", **experts)
        generator = torch.Generator().manual_seed(len(result))
        # Some ranks have fewer micro-batches than others, or none.
        updates = [micro_batches(generator, num) for num in (5, 4, 3, 1)]
        result[name] = Case(model, REVERSE, updates, OPTIMIZER)
        if loss == "mixed":
            student = torch_student(result[name])
            updates = [with_policy(batches, student, generator) for batches in updates]
            result[name] = Case(model, MIXED, updates, OPTIMIZER, split=True)
    half = write_dense(folder / "half", "qwen3", tied=True, dtype="bfloat16")
    result["bfloat16"] = Case(
        half,
        REVERSE,
        [micro_batches(torch.Generator().manual_seed(0), 2)] * 16,
        Optimizer(clip_grad=None),
        lrs=(4e-5,) * 16,
        dtype="bfloat16",
    )
    for name, case in RESUMED.items():
        result[name] = resumed(result[case], folder / f"{name}.safetensors")
    result["failures"] = replace(result[SHORT[1]], fails=True)
    return result


@pytest.fixture(scope="module")
def references(cases):
    """The trajectory of one process, by case, made once."""
    made = {}

    def reference(name):
        if name not in made:
            made[name] = trained(cases[name])
        return made[name]

    return reference


@pytest.fixture(scope="module")
def grids(cases, tmp_path_factory):
    """Results of the ranks of a grid by case, and the folder of their exports. Each grid is launched once."""
    made = {}

    def grid(name):
        if name not in made:
            shard, world = GRIDS[name]
            folder = tmp_path_factory.mktemp(name)
            jobs = {}
            for case in CASES[name]:
                (folder / case).mkdir()
                jobs[case] = cases[case].job(folder / case)
            torch.save(jobs, folder / "jobs")
            arguments = (str(folder / "jobs"), str(shard))
            outputs = run_ranks(WORKER, world, folder, *arguments, deadline_s=DEADLINE_S)
            made[name] = folder, [torch.load(out, weights_only=False) for out in outputs]
        return made[name]

    return grid


def follows(grids, references, grid, case, rel=1e-5, rel_gradient=1e-5):
    """Compare losses, norms and raw gradient with one process; return the weights of both after training."""
    folder, ranks = grids(grid)
    expected = references(case)
    losses = [sum(rank[case]["losses"][i] for rank in ranks) for i in range(len(expected.losses))]
    assert losses == pytest.approx(expected.losses, rel=rel)
    for rank in ranks:
        assert rank[case]["norms"] == pytest.approx(expected.norms, rel=rel)
        assert rank[case]["norms"] == ranks[0][case]["norms"]
    gradients = ranks[0][case]["gradients"]
    assert gradients.keys() == expected.gradients.keys()
    largest = max(float(g.abs().max()) for g in expected.gradients.values())
    for name, gradient in gradients.items():
        assert float((gradient - expected.gradients[name]).abs().max()) <= rel_gradient * largest, name
    return load_file(folder / case / "trained" / "model.safetensors"), expected.weights


def state_of(ranks, case):
    """The state of all ranks; `joined` sees to it that they have every element once."""
    return joined(part for rank in ranks for part in rank[case]["state"])


@on_grids(*FAMILIES)
def test_updates_follow_one_process(grids, references, cases, grid, case):
    """Four updates with clipping and weight decay; ranks with few micro-batches, or none, among them."""
    actual, expected = follows(grids, references, grid, case)
    start = load_file(cases[case].folder / "model.safetensors")
    assert actual.keys() == start.keys()
    moved = torch.stack([(expected[n] - start[n]).norm() for n in start]).norm()
    apart = torch.stack([(expected[n] - actual[n]).norm() for n in start]).norm()
    assert float(apart / moved) < 1e-4


@on_grids(*FAMILIES)
def test_the_ranks_together_save_what_one_process_would(grids, cases, grid, case):
    folder, ranks = grids(grid)
    state, exported = state_of(ranks, case), load_file(folder / case / "trained" / "model.safetensors")
    masters = {name: tuple(t.shape) for name, t in state.items() if name.startswith("master.")}
    assert masters == torch_student(cases[case]).state_shapes()
    assert all(torch.equal(state[f"master.{name}"], tensor) for name, tensor in exported.items())
    assert {float(state[f"adamw.step.{name}"]) for name in exported} == {4.0}
    sizes = [sum(part.tensor.nbytes for part in rank[case]["state"]) for rank in ranks]
    assert case == MIXTURE or max(sizes) < 1.1 * sum(sizes) / len(sizes)


@on_grids(*RESUMED)
def test_a_state_passes_between_one_process_and_every_grid(grids, references, cases, grid, case):
    """A state of one process resumes on the grid, and that of the grid in one process."""
    _, ranks = grids(grid)
    straight = cases[RESUMED[case]]
    expected = references(RESUMED[case])
    losses = [sum(rank[case]["losses"][i] for rank in ranks) for i in range(2)]
    assert losses == pytest.approx(expected.losses[-2:], rel=1e-5)
    assert ranks[0][case]["norms"] == pytest.approx(expected.norms[-2:], rel=1e-5)
    student = torch_student(straight)
    student.load_state(HeldTensors(state_of(ranks, case)))
    stats = student.accumulate_gradients(straight.updates[0], straight.objective)
    assert sum(float(s.loss.sum()) for s in stats) == pytest.approx(expected.next_loss, rel=1e-5)
    assert student.optimizer_step(1e-3) == pytest.approx(expected.next_norm, rel=1e-5)
    steps = {float(t) for key, t in joined(student.state()).items() if key.startswith("adamw.step.")}
    assert steps == {5.0}


@on_grids("bfloat16")
def test_bfloat16_keeps_float32_shards(grids, references, cases, grid, case):
    """Updates far below bfloat16's resolution accumulate, and change as many weights as in one process."""
    actual, expected = follows(grids, references, grid, case, rel=5e-2, rel_gradient=0.1)
    start = load_file(cases[case].folder / "model.safetensors")

    def moved(weights):
        flat = torch.cat([(weights[n] != start[n]).flatten() for n in start if start[n].ndim > 1])
        return float(flat.float().mean())

    assert {t.dtype for t in actual.values()} == {torch.bfloat16}
    assert moved(expected) > 0.8  # 0.09 if each update were rounded
    assert moved(actual) == pytest.approx(moved(expected), abs=0.05)
    assert {t.dtype for t in state_of(grids(grid)[1], case).values()} == {torch.float32}


@on_grids(*SHORT, MIXTURE, "bfloat16")
def test_export_of_untouched_weights_is_the_source_bit_for_bit(grids, cases, grid, case):
    exported = load_file(grids(grid)[0] / case / "untouched" / "model.safetensors")
    source = load_file(cases[case].folder / "model.safetensors")
    assert exported.keys() == source.keys()
    assert all(torch.equal(exported[name], source[name]) for name in source)


@on_grids(*SHORT, MIXTURE)
def test_scores_and_the_unsharded_model_are_those_of_one_process(grids, cases, grid, case):
    folder, ranks = grids(grid)
    student = torch_student(cases[case])
    expected = student.score(cases[case].updates[0], Measured((), None, 1.0))
    for rank, result in enumerate(ranks):
        for mine, stats in zip(result[case]["scores"], expected[rank :: len(ranks)], strict=True):
            torch.testing.assert_close(mine, stats.logprob_S, rtol=1e-5, atol=1e-5)
    trained_model = AutoModelForCausalLM.from_pretrained(folder / case / "trained")
    with torch.no_grad():
        logits = trained_model(torch.tensor([[1, 2, 3, 4, 5]])).logits
    for result in ranks:
        torch.testing.assert_close(result[case]["logits"], logits, rtol=1e-5, atol=1e-5)


@on_grids(*SHORT)
def test_a_rank_has_its_share_of_the_weights(grids, cases, grid, case):
    shard, _ = GRIDS[grid]
    total = sum(t.numel() for t in load_file(cases[case].folder / "model.safetensors").values())
    for result in grids(grid)[1]:
        assert result[case]["own"] == pytest.approx(total / shard, rel=0.05)


@on_grids("failures")
def test_a_failure_of_one_rank_is_raised_by_all(grids, grid, case):
    for result in grids(grid)[1]:
        own = result[case]
        assert own["teacher"].startswith("NumericsError: the logits of target 0: not finite")
        assert own["gradient"].startswith("NumericsError: the gradient is NaN or infinite")
        assert own["state"].startswith("StorageError: the checkpoint is not of this student")
        assert own["unchanged"]
