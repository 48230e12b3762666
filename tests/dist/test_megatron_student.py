"""The Megatron student on gloo grids follows the torch student and transformers: numbers, weights, errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from enumeration import ANSWERS, EOS, Reference, V, assert_equal, engine_round
from megatron_cases import (
    MIXED,
    REVERSE,
    VALID,
    Case,
    micro_batches,
    torch_student,
    trained,
    with_policy,
    write_dense,
)
from ranks import needs_megatron, run_ranks
from safetensors.torch import load_file, save_file
from states import HeldTensors, joined
from transformers import AutoModelForCausalLM

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.models import Machine, load_models
from mergeopd.models.facts import ModelFacts
from mergeopd.planner.setup import shard_weights
from mergeopd.preflight.inputs import preflight
from mergeopd.recipe.training import Optimizer
from mergeopd.student.megatron.architecture import Architecture
from mergeopd.types import Rollout

pytestmark = needs_megatron

WORKER = Path(__file__).with_name("megatron_worker.py")
DEADLINE_S = 300
# tensor, pipeline, processes, context
GRIDS = {
    "1x1": (1, 1, 1, 1),
    "TP2xPP2": (2, 2, 4, 1),
    "TP2xDP2": (2, 1, 4, 1),
    "PP2xDP2": (1, 2, 4, 1),
    "TP2xCP2": (2, 1, 4, 2),
    "CP2xPP2": (1, 2, 4, 2),
    "CP2xDP2": (1, 1, 4, 2),
}
OPTIMIZER = Optimizer(weight_decay=0.1, clip_grad=0.3, betas=(0.9, 0.98), eps=1e-6)
# Family, head and loss; every loss meets every family and both heads.
PARITY = (
    "qwen3 tied mixed",
    "qwen3 untied reverse",
    "qwen2 tied mixed",
    "qwen2 untied reverse",
    "llama tied reverse",
    "llama untied mixed",
)
# Run on TP2xPP2 in `make test`: every family, both heads, both losses. The others follow in `make test-dist`.
SHORT = (
    "qwen3 tied mixed",
    "qwen2 untied reverse",
    "llama tied reverse",
    "sequence parallel",
    "recompute",
    "bfloat16",
    "qwen3 tied mixed resumed",
    "bfloat16 resumed",
    "enumerated",
    "failures",
    "fused norms sequence parallel",
    "offloaded",
    "offloaded resumed",
)
LAUNCHES = {**GRIDS, "TP2xPP2 others": GRIDS["TP2xPP2"]}


def on_grids(*cases, tensor=1):
    """Parametrize with every case on every grid of at least `tensor` tensor ranks, as launch and case."""
    result = []
    for grid in GRIDS:
        for case in cases if GRIDS[grid][0] >= tensor else ():
            short = grid == "TP2xPP2" and case in SHORT
            launch = "TP2xPP2 others" if grid == "TP2xPP2" and not short else grid
            result.append(pytest.param(launch, case, marks=() if short else pytest.mark.long))
    return pytest.mark.parametrize(("grid", "case"), result)


def resumed(case, path):
    """Reduce `case` to its last two updates, resumed from a state of the torch student."""
    student = torch_student(case)
    for batches, lr in zip(case.updates[:-2], case.lrs[:-2], strict=True):
        list(student.accumulate_gradients(batches, case.objective))
        student.optimizer_step(lr)
    save_file(joined(student.state()), path)
    return replace(case, updates=case.updates[-2:], lrs=case.lrs[-2:], state=path)


@pytest.fixture(scope="module")
def enumerated(tmp_path_factory, write_job_in):
    """All responses of at most two tokens in the engine's micro-batches, and their gradient by autograd."""
    folder = tmp_path_factory.mktemp("enumerated")
    loss = {"reverse_kl": 1.0, "forward_kl": 0.5, "temperature": 2.0}
    phase = {"name": "merge", "updates": 1, "text": "dataset", "loss": loss}
    recipe = write_job_in(folder, {"phases": [phase]}, micro_batch_tokens=60)
    for file in write_dense(folder / "qwen3", "qwen3", tied=True, vocab=V + 1, eos=EOS).glob("*.*"):
        if file.name != "tokenizer.json":
            file.replace(folder / "base" / file.name)
    parts = load_models(preflight(recipe, ()), Machine(torch.device("cpu"), SingleProcess()))
    render = parts.inputs.student.render
    rollouts = [
        Rollout(prompt, i, render(prompt), answer, "student", "eos" if answer[-1] == EOS else "length")
        for name in sorted(parts.inputs.prompts)
        for prompt in parts.inputs.prompts[name]
        for i, answer in enumerate(ANSWERS)
    ]
    reference = Reference(parts)
    total = sum(losses.sum() for losses in reference.token_losses(loss, rollouts))
    expected = reference.gradient(total / sum(len(r.response_ids) for r in rollouts))
    micro_batches, objectives, plain = [], [], parts.student.accumulate_gradients

    def recorded(them, objective, observe):
        objectives.append(objective)
        micro_batches.extend(them)
        return plain(micro_batches, objective, observe)

    parts.student.accumulate_gradients = recorded
    engine_round(parts, rollouts)
    case = Case(folder / "base", objectives[0], [micro_batches], OPTIMIZER, lrs=(0.0,), num_valid=V)
    return case, expected


@pytest.fixture(scope="module")
def cases(tmp_path_factory, enumerated):
    folder = tmp_path_factory.mktemp("models")
    result = {}
    for name in PARITY:
        family, head, loss = name.split()
        model = write_dense(folder / name.replace(" ", "_"), family, tied=head == "tied")
        generator = torch.Generator().manual_seed(len(result))
        # Of three copies one has nothing to do in the last update.
        updates = [micro_batches(generator, num) for num in (5, 4, 3, 1)]
        result[name] = Case(model, REVERSE, updates, OPTIMIZER)
        if loss == "mixed":
            student = torch_student(result[name])
            updates = [with_policy(micro_batches, student, generator) for micro_batches in updates]
            result[name] = Case(model, MIXED, updates, OPTIMIZER, split=True)
    result["sequence parallel"] = replace(result["llama untied mixed"], sequence_parallel=True)
    result["sequence parallel tied"] = replace(result["qwen2 tied mixed"], sequence_parallel=True)
    result["fused norms"] = replace(result["qwen3 untied reverse"], fused_norms=True)
    result["fused norms sequence parallel"] = replace(
        result["qwen2 untied reverse"], fused_norms=True, sequence_parallel=True
    )
    offloaded = OPTIMIZER.model_copy(update={"offload": True})
    result["offloaded"] = replace(result["qwen3 tied mixed"], optimizer=offloaded)
    result["recompute"] = replace(result["llama tied reverse"], recompute=True)
    half = write_dense(folder / "half", "qwen3", tied=True, dtype="bfloat16")
    result["bfloat16"] = Case(
        half,
        REVERSE,
        [micro_batches(torch.Generator().manual_seed(0), 2)] * 16,
        Optimizer(clip_grad=None),
        lrs=(4e-5,) * 16,
        dtype="bfloat16",
    )
    for name in ("qwen3 tied mixed", "qwen2 untied reverse", "bfloat16", "offloaded"):
        result[f"{name} resumed"] = resumed(result[name], folder / f"{name}.safetensors")
    generator = torch.Generator().manual_seed(20)
    result["twenty"] = Case(
        result["llama untied mixed"].folder,
        REVERSE,
        [micro_batches(generator, 2) for _ in range(20)],
        OPTIMIZER,
        lrs=(1e-3,) * 20,
    )
    result["enumerated"], _ = enumerated
    result["failures"] = replace(result["qwen3 untied reverse"], fails=True)
    return result


@pytest.fixture(scope="module")
def references(cases):
    """The torch student's trajectory, by case, made once."""
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
            tensor, pipeline, world, context = LAUNCHES[name]
            folder = tmp_path_factory.mktemp(name)
            for case in cases:
                (folder / case).mkdir()
            jobs = {
                case: settings.job(folder / case)
                for case, settings in cases.items()
                if (tensor > 1 or not settings.sequence_parallel)
                and (GRIDS["TP2xPP2"] != LAUNCHES[name] or (case in SHORT) == (name == "TP2xPP2"))
            }
            torch.save(jobs, folder / "jobs")
            sizes = {"tensor": tensor, "pipeline": pipeline, "context": context}
            arguments = (str(folder / "jobs"), json.dumps(sizes))
            outputs = run_ranks(WORKER, world, folder, *arguments, deadline_s=DEADLINE_S)
            made[name] = folder, [torch.load(out, weights_only=False) for out in outputs]
        return made[name]

    return grid


def follows(grids, references, grid, case, rel=1e-5, rel_gradient=1e-5):
    """Compare losses, norms and raw gradient with the torch student; the weights of both after training."""
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


@on_grids(*PARITY)
def test_updates_follow_the_torch_student(grids, references, cases, grid, case):
    """Four updates with clipping and weight decay; ranks with few micro-batches, or none, among them."""
    actual, expected = follows(grids, references, grid, case)
    start = load_file(cases[case].folder / "model.safetensors")
    assert actual.keys() == start.keys()
    moved = torch.stack([(expected[n] - start[n]).norm() for n in start]).norm()
    apart = torch.stack([(expected[n] - actual[n]).norm() for n in start]).norm()
    assert float(apart / moved) < 1e-4


@on_grids("twenty")
def test_twenty_updates_stay_together(grids, references, grid, case):
    follows(grids, references, grid, case)


@on_grids("enumerated")
def test_gradient_over_all_responses_equals_autograd(grids, enumerated, grid, case):
    """The same enumeration as for the torch student, through the engine's own weights and packs; float32."""
    _, ranks = grids(grid)
    assert_equal(ranks[0][case]["gradients"], enumerated[1], tolerance=1e-5)


@on_grids("sequence parallel", "sequence parallel tied", tensor=2)
def test_sequence_parallel_changes_nothing(grids, references, grid, case):
    follows(grids, references, grid, case)


@on_grids("recompute")
def test_recomputed_layers_change_nothing(grids, references, grid, case):
    follows(grids, references, grid, case)
    for rank in grids(grid)[1]:
        assert rank[case]["calls"] == 2 * rank["llama tied reverse"]["calls"]


@on_grids("fused norms")
def test_norms_within_linear_layers_change_nothing(grids, references, cases, grid, case):
    """As in Transformer Engine: the names of the folder and of the local layers, the same gradients."""
    follows(grids, references, grid, case)
    assert (
        grids(grid)[1][0][case]["stream"].keys() == load_file(cases[case].folder / "model.safetensors").keys()
    )


@on_grids("fused norms sequence parallel", tensor=2)
def test_partial_gradients_of_norms_within_linear_layers_are_summed(grids, references, grid, case):
    follows(grids, references, grid, case)


@on_grids("offloaded")
def test_moments_on_the_host_change_no_bit(grids, grid, case):
    folder, ranks = grids(grid)
    for rank in ranks:
        assert rank[case]["norms"] == rank["qwen3 tied mixed"]["norms"]
    actual, expected = (
        load_file(folder / name / "trained" / "model.safetensors") for name in (case, "qwen3 tied mixed")
    )
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@on_grids("qwen3 tied mixed resumed", "qwen2 untied reverse resumed", "bfloat16 resumed", "offloaded resumed")
def test_a_state_passes_between_torch_and_every_grid(grids, references, cases, grid, case):
    """A state of the torch student resumes on the grid, and that of the grid in the torch student."""
    _, ranks = grids(grid)
    model = case.removesuffix(" resumed")
    expected = references(model)
    rel = 5e-2 if model == "bfloat16" else 1e-5
    assert all(rank[case]["same state"] for rank in ranks)
    losses = [sum(rank[case]["losses"][i] for rank in ranks) for i in range(2)]
    assert losses == pytest.approx(expected.losses[-2:], rel=rel)
    assert ranks[0][case]["norms"] == pytest.approx(expected.norms[-2:], rel=rel)
    student = torch_student(cases[model])
    student.load_state(HeldTensors(joined(part for rank in ranks for part in rank[case]["state"])))
    stats = student.accumulate_gradients(cases[model].updates[0], cases[model].objective)
    assert sum(float(s.loss.sum()) for s in stats) == pytest.approx(expected.next_loss, rel=rel)
    assert student.optimizer_step(1e-3) == pytest.approx(expected.next_norm, rel=rel)
    second = {float(t) for key, t in joined(student.state()).items() if key.startswith("adamw.step.")}
    assert second == {len(expected.losses) + 1.0}


@on_grids("qwen3 tied mixed resumed", "qwen2 untied reverse resumed", "bfloat16 resumed")
def test_ranks_save_equal_numbers_of_bytes(grids, grid, case):
    """Tied embeddings of two stages, norms that ranks have in common, and flat ranges of the optimizer."""
    sizes = [sum(part.tensor.nbytes for part in rank[case]["state"]) for rank in grids(grid)[1]]
    assert max(sizes) <= 1.1 * min(sizes)


@on_grids("qwen3 tied mixed")
def test_ranks_share_the_true_vocabulary(grids, grid, case):
    """37 rows are padded to 38 for two ranks; 35 of them are tokens. Context ranks divide a shard."""
    (tensor, _, _, context), ranks = LAUNCHES[grid], grids(grid)[1]
    expected = {
        (1, 1): [(0, 35)],
        (2, 1): [(0, 19), (19, 35)],
        (1, 2): [(0, 18), (18, 35)],
        (2, 2): [(0, 9), (19, 28), (9, 19), (28, 35)],
    }[tensor, context]
    assert [rank[case]["vocab"] for rank in ranks] == expected * (len(ranks) // len(expected))


@on_grids("qwen3 tied mixed")
def test_a_plan_counts_the_weights_of_every_rank(grids, cases, grid, case):
    (tensor, pipeline), ranks = LAUNCHES[grid][:2], grids(grid)[1]
    arch = Architecture.read(ModelFacts.read(cases[case].folder))
    for rank in ranks:
        own = rank[case]
        assert own["num_weights"] == shard_weights(arch, tensor, pipeline, 1, own["stage"])


@on_grids("qwen2 untied reverse")
def test_a_new_state_has_no_moments(grids, cases, grid, case):
    names = {name for rank in grids(grid)[1] for name in rank[case]["fresh state"]}
    assert names == joined(torch_student(cases[case]).state()).keys()


@on_grids("bfloat16")
def test_bfloat16_keeps_float32_main_parameters(grids, references, cases, grid, case):
    """Updates far below bfloat16's resolution accumulate, and change as many weights as in the torch student."""
    actual, expected = follows(grids, references, grid, case, rel=5e-2, rel_gradient=0.1)
    start = load_file(cases[case].folder / "model.safetensors")

    def moved(weights):
        flat = torch.cat([(weights[n] != start[n]).flatten() for n in start if start[n].ndim > 1])
        return float(flat.float().mean())

    assert {t.dtype for t in actual.values()} == {torch.bfloat16}
    assert moved(expected) > 0.8  # 0.09 if each update were rounded
    assert moved(actual) == pytest.approx(moved(expected), abs=0.05)


@on_grids(*PARITY)
def test_scores_equal_transformers(grids, cases, grid, case):
    """Log-probabilities and entropies of every trained token against full logits of the Hugging Face model."""
    reference = AutoModelForCausalLM.from_pretrained(cases[case].folder)
    _, pipeline, world, _ = LAUNCHES[grid]
    for rank, result in enumerate(grids(grid)[1]):
        scores = result[case]["scores"]
        if rank < world - world // pipeline:  # not the last stage
            assert scores == []
            continue
        for micro, score in zip(cases[case].updates[0], scores, strict=True):
            flags = micro.trained or [None] * len(micro.prompts)
            rows = []
            for prompt, response, own in zip(micro.prompts, micro.responses, flags, strict=True):
                with torch.no_grad():
                    logits = reference(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
                rows.append(
                    logits[:, :VALID].log_softmax(-1)[[True] * len(response) if own is None else own.tolist()]
                )
            logp = torch.cat(rows)
            labels = torch.tensor([t for r in micro.labels for t in r])
            torch.testing.assert_close(
                score["logprob"], logp.gather(1, labels[:, None])[:, 0], rtol=1e-5, atol=2e-5
            )
            torch.testing.assert_close(score["entropy"], -(logp.exp() * logp).sum(1), rtol=1e-5, atol=2e-5)


@on_grids(*PARITY, "bfloat16")
def test_export_of_untouched_weights_is_the_source_bit_for_bit(grids, cases, grid, case):
    folder, _ = grids(grid)
    source, exported = cases[case].folder, folder / case / "untouched"
    expected = load_file(source / "model.safetensors")
    files = sorted(exported.glob("*.safetensors"))
    assert len(files) > 1  # the worker allows 20 kB a file
    actual = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name
    assert (exported / "tokenizer.json").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(exported)
    assert loaded.dtype == expected["model.norm.weight"].dtype


@on_grids(*PARITY, "bfloat16")
def test_the_first_rank_streams_the_folders_tensors_bit_for_bit(grids, cases, grid, case):
    first, *others = [rank[case]["stream"] for rank in grids(grid)[1]]
    assert others == [{}] * len(others)
    expected = load_file(cases[case].folder / "model.safetensors")
    assert first.keys() == expected.keys()  # a tied head once, as the embedding
    for name, tensor in first.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


@on_grids("failures")
def test_all_ranks_raise_the_same_and_keep_their_weights(grids, grid, case):
    result = [rank[case] for rank in grids(grid)[1]]
    teachers = {rank["teacher"] for rank in result}
    assert len(teachers) == 1
    assert "the logits of target 0: not finite" in teachers.pop()
    for rank in result:
        assert rank["gradient"].startswith("NumericsError: the gradient is NaN or infinite")
        assert rank["unchanged"]
        assert (
            rank["summed"]
            == "RuntimeError: the gradient is already summed over the ranks; call optimizer_step first"
        )
        assert rank["float64"] == "ValueError: student.dtype: float64 needs student.backend: torch"
        assert rank["layers"] == (
            "ModelError: student.parallel.layers: transformer_engine, but there is no GPU in this process; "
            "use auto or local"
        )
        assert rank["state"].startswith("StorageError: the checkpoint is not of this student: master.")
