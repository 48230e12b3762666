"""Raw gradients of all responses of at most two tokens on gloo grids, compared with autograd.

All ranks score the responses; their targets go to the loss ranks, and the replicas accumulate. The expected
gradients are those of independent Hugging Face models. Float32, as in Megatron's layers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from enumeration import ANSWERS, EOS, Plain, V, advantages, assert_equal, rewards_of
from megatron_cases import write_dense
from ranks import needs_megatron, run_ranks

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.models import Machine, load_models
from mergeopd.engine.schedule import split_updates
from mergeopd.preflight.inputs import preflight

pytestmark = [
    needs_megatron,
    pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's"),
    pytest.mark.long,
]

WORKER = Path(__file__).with_name("run_worker.py")
DEADLINE_S = 300
SAMPLES = {"samples_per_prompt": len(ANSWERS), "max_new_tokens": 6}
GRIDS = {"TP2": (2, 1), "PP2": (1, 2), "DP2": (1, 1)}
PHASES = {
    "reverse": {"loss": "reverse_kl"},
    "mixed": {
        "loss": {"reverse_kl": 0.6, "sampled_reverse_kl": 0.5, "outcome": 1.0},
        "correction": {"kind": "truncate", "high": 1.2},
        "updates_per_round": 2,
    },
    "sampled": {"loss": "sampled_reverse_kl", "correction": {"kind": "mask", "low": 0.7, "high": 1.4}},
}


def losses(plain, phase, grades):
    """Loss of every response before denominators, by the definitions; only its gradient matters.

    At the weights before the round the ratio is 1, so the surrogate's gradient is the advantage's times log p.
    """
    scaled = advantages(plain.rollouts, grades, "unbiased")
    for i, (rollout, advantage) in enumerate(zip(plain.rollouts, scaled, strict=True)):
        outcome = 0.0 if rollout.finish == "length" else advantage
        rho, d, lp, exact = plain.rho(i), plain.d(i), plain.lp[i], plain.exact(i).sum()
        if phase == "reverse":
            yield exact
        elif phase == "mixed":
            yield 0.6 * exact - (rho.clamp(max=1.2) * (0.5 * d + outcome) * lp).sum()
        else:
            yield -(rho * ((rho >= 0.7) & (rho <= 1.4)) * d * lp).sum()


@pytest.fixture(scope="module")
def rounds(tmp_path_factory, write_job_in):
    """By phase: the recipe, a file of responses and rewards, the gradient of every update."""
    actual = {}
    for name, phase in PHASES.items():
        folder = tmp_path_factory.mktemp(name)
        whole = {"name": "p", "updates": 2, "prompts_per_round": 4, "text": "student", **phase}
        recipe = write_job_in(folder, {"phases": [whole], "rollout": SAMPLES}, micro_batch_tokens=60)
        document = json.loads(recipe.read_text())
        for source in document["prompts"]:
            source["verifier"] = {"kind": "regex", "pattern": "."}
        recipe.write_text(json.dumps(document))
        for file in write_dense(folder / "qwen3", "qwen3", tied=True, vocab=V + 1, eos=EOS).glob("*.*"):
            if file.name != "tokenizer.json":
                file.replace(folder / "base" / file.name)
        plain = Plain(load_models(preflight(recipe, ()), Machine(torch.device("cpu"), SingleProcess())))
        grades = rewards_of(plain.rollouts)
        torch.save((plain.rollouts, grades), folder / "round.pt")
        of_responses = list(losses(plain, name, grades))
        expected = [
            plain.gradient(sum(of_responses[i] for i in update) / plain.num_tokens(update))
            for update in split_updates(plain.rollouts, phase.get("updates_per_round", 1))
        ]
        actual[name] = recipe, folder / "round.pt", expected
    return actual


@pytest.fixture(scope="module")
def gradients(tmp_path_factory, rounds):
    """Gradients of rank 0, by phase and grid."""
    folder = tmp_path_factory.mktemp("enumerated")
    jobs = []
    for name, (recipe, file, _) in rounds.items():
        for grid, (tensor, pipeline) in GRIDS.items():
            parallel = json.dumps({"tensor": tensor, "pipeline": pipeline})
            overrides = ["student.backend=megatron", f"student.parallel={parallel}"]
            jobs.append(
                {"name": f"{name}-{grid}", "recipe": str(recipe), "overrides": overrides, "round": str(file)}
            )
    (folder / "jobs.json").write_text(json.dumps(jobs))
    outputs = run_ranks(WORKER, 2, folder, str(folder / "jobs.json"), deadline_s=DEADLINE_S)
    ranks = [json.loads(out.read_text()) for out in outputs]
    assert ranks[0] == ranks[1]  # losses and errors, also of the rank that has none of the tokens
    return {job["name"]: torch.load(folder / f"rank0.{job['name']}.gradients") for job in jobs}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("phase", PHASES)
def test_gradient_of_a_round_on_a_grid_equals_autograd(rounds, gradients, phase, grid):
    actual, expected = gradients[f"{phase}-{grid}"], rounds[phase][2]
    assert len(actual) == len(expected)
    for mine, wanted in zip(actual, expected, strict=True):
        assert_equal(mine, wanted, tolerance=1e-5)
