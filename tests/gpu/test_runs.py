"""Whole runs on the device: equal to those of the CPU in float64, stopped and resumed, in every precision.

Sampling is keyed, so a run in float64 draws the same tokens on every device, and ends with the same weights up to
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_jobs import write_byte_job
from recorded_runs import Recorder, run_recorded
from safetensors.torch import load_file
from torch import Tensor

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.models import Machine, load_models
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.events import EvaluationDone
from mergeopd.rollout.local import Generator, generate
from mergeopd.rollout.protocol import GenerationRequest
from mergeopd.types import Sampling

CPU = torch.device("cpu")
MIXED = {"on_policy_fraction": 0.5, "otherwise": "dataset"}
SHORT = {"updates": 2, "prompts_per_round": 4}
JOBS: dict[str, dict[str, Any]] = {
    "texts": {
        "phases": [
            {"name": "cold", "text": "teacher", **SHORT, "loss": {"forward_kl": 1.0, "nll": 0.1}},
            {"name": "merge", **SHORT, "loss": {"reverse_kl": 0.5, "jsd": 0.5, "temperature": 2.0}},
        ]
    },
    "prior policy beside data set text": {
        "phases": [
            {
                "name": "mix", "text": MIXED, "updates": 4, "updates_per_round": 2, "prompts_per_round": 6,
                "loss": {"reverse_kl": 1.0, "nll": 0.1, "sampled_reverse_kl": {"discount": 0.9}, "outcome": 0.5},
                "balance": {"tokens": "equal", "follow_gap": 1.0},
                "correction": "sequence_mask",
            }
        ]
    },
    "top k": {
        "rollout": {"max_new_tokens": 6, "samples_per_prompt": 4, "temperature": 1.3, "top_p": 0.9},
        "phases": [
            {
                "name": "top", "updates": 2, "updates_per_round": 2, "prompts_per_round": 4,
                "loss": {
                    "reverse_kl": 1.0, "outcome": {"teacher": {"kind": "credit"}},
                    "support": {"top_k": 3, "of": "teacher", "rest": "tail"},
                },
                "correction": "truncate",
            }
        ],
    },
    "followed": {
        "teachers": {"self": {"student": {"ema": 0.9}}, "two": {"card": "two.yaml", "dtype": "float64"}},
        "prompts": [
            {"source": "left.jsonl", "domain": "left", "teachers": {"self": 1.0, "two": 0.5}},
            {"source": "right.jsonl", "domain": "right", "teachers": "two"},
        ],
        "phases": [{"name": "p", "updates": 3, "prompts_per_round": 4, "loss": {"tvd": 1.0, "nll": 0}}],
        "memory": {"hidden_states_gib": 0},
    },
}  # fmt: skip
BRIDGES: dict[str, tuple[object, dict[str, Any]]] = {
    "span": ("span", {"loss": {"sampled_reverse_kl": 1.0}, "updates_per_round": 2}),
    "pieces": ("pieces", {"loss": {"reverse_kl": 1.0}}),
    "gold": ("gold", {"loss": {"forward_kl": 1.0, "nll": 0.1}, "text": {**MIXED, "otherwise": "teacher"}}),
    "uld": ("uld", {"loss": "forward_kl"}),
    "projection": ({"projection": {"direction": "reverse"}}, {"loss": "reverse_kl"}),
}


class ScoreRecorder(Recorder):
    @property
    def losses(self) -> list[tuple[float, float]]:
        return [(e.loss, e.grad_norm) for e in self.updates]

    @property
    def accuracies(self) -> list[tuple[str, float]]:
        return [(e.model.key, e.accuracy.value) for e in self.events if isinstance(e, EvaluationDone)]


def run(
    recipe: Path, device: torch.device, *overrides: str, stop_after: int | None = None
) -> tuple[ScoreRecorder, dict[str, Tensor]]:
    """Run a recipe or resume it; its events, and the exported weights if it ended."""
    recorder = ScoreRecorder(stop_after)
    file = run_recorded(recipe, device, *overrides, recorder=recorder).export / "model.safetensors"
    return recorder, load_file(file) if file.is_file() else {}


def job(write_job: Callable[..., Path], recipe: Mapping[str, Any], dtype: str = "float64") -> Path:
    path = write_job(
        {
            "rollout": {"max_new_tokens": 6, "samples_per_prompt": 4},
            "optimizer": {"lr": 0.01},
            "checkpoint": {"every": 1, "keep": 2},
            "evaluation": {
                "prompts": [
                    {"source": "held_out.jsonl", "domain": "right", "verifier": "exact", "expert": "two"}
                ]
            },
            **recipe,
        },
        dtype=dtype,
    )
    (path.parent / "held_out.jsonl").write_text('{"prompt": "c c", "answer": "c"}\n' * 3)
    return path


def assert_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    assert expected
    for name, wanted in expected.items():
        torch.testing.assert_close(actual[name], wanted, rtol=tolerance, atol=tolerance)


VERIFIERS = tuple(f'prompts.{i}.verifier={{"kind": "regex", "pattern": "a"}}' for i in (0, 1))


@pytest.mark.parametrize("name", JOBS)
def test_a_run_equals_that_of_the_cpu(
    device: torch.device, write_job: Callable[..., Path], name: str
) -> None:
    """Losses, gradient norms, accuracies and weights, in float64."""
    recipe = job(write_job, JOBS[name])
    here, expected = run(recipe, CPU, "output=here", *VERIFIERS)
    there, actual = run(recipe, device, "output=there", *VERIFIERS)
    assert len(there.losses) == len(here.losses) > 1
    for one, other in zip(there.losses, here.losses, strict=True):
        assert one == pytest.approx(other, rel=1e-8)
    assert there.accuracies == here.accuracies
    assert_close(actual, expected, 1e-6)


@pytest.mark.parametrize("name", BRIDGES)
def test_a_bridge_equals_that_of_the_cpu(device: torch.device, tmp_path: Path, name: str) -> None:
    bridge, phase = BRIDGES[name]
    document = {
        "teachers": {"other": {"card": "other.yaml", "dtype": "float64", "bridge": bridge}},
        "phases": [{"name": "merge", "updates": 2, "prompts_per_round": 3, **phase}],
    }
    merges = [("b", "c"), ("c", "a"), ("a", "b")]
    recipe = write_byte_job(tmp_path, document, merges=merges, turned=True)
    here, expected = run(recipe, CPU, "output=here")
    there, actual = run(recipe, device, "output=there")
    for one, other in zip(there.losses, here.losses, strict=True):
        assert one == pytest.approx(other, rel=1e-7)
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_run_resumes_after_a_crash(
    device: torch.device, write_job: Callable[..., Path], dtype: str, stop_after: int
) -> None:
    """Resume from a checkpoint, with the optimizer state on the device that fused AdamW needs."""
    recipe = job(write_job, JOBS["prior policy beside data set text"], dtype)
    whole, straight = run(recipe, device, "output=straight", *VERIFIERS)
    before, none = run(recipe, device, "output=broken", *VERIFIERS, stop_after=stop_after)
    after, resumed = run(recipe, device, "output=broken", *VERIFIERS)
    assert none == {}
    assert len(before.losses) == stop_after
    assert 0 < len(after.losses) < 4 or stop_after == 1
    # An accelerator may sum in another order; in low precision that may change a sampled token.
    if dtype == "float64":
        assert_close(resumed, straight, 1e-6)
        assert after.losses[-1] == pytest.approx(whole.losses[-1], rel=1e-7)
    assert resumed.keys() == straight.keys()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in resumed.values())


@pytest.mark.parametrize(
    "sampling", [Sampling(0.0, 1.0, 20), Sampling(1.0, 1.0, 20), Sampling(0.7, 0.9, 20)], ids=str
)
def test_decoding_equals_that_of_the_cpu(
    device: torch.device, write_job: Callable[..., Path], sampling: Sampling
) -> None:
    recipe = job(write_job, {})
    result = {}
    for where in (CPU, device):
        parts = load_models(preflight(recipe, [f"output={where.type}"]), Machine(where, SingleProcess()))
        requests = [GenerationRequest(f"k{i}", 0, tuple(j % 4 for j in range(i % 7 + 1))) for i in range(40)]
        student = parts.inputs.student
        with parts.student.unsharded() as (body, head):
            generator = Generator(body, head, student.eos_ids, student.tokenizer, where)
            result[where] = generate(
                generator, requests, sampling, seed=1, batch_size=16, progress=lambda done: None
            )
    assert [c.response_ids.tolist() for c in result[device]] == [c.response_ids.tolist() for c in result[CPU]]
    assert {c.finish for c in result[CPU]} <= {"eos", "length"}
    for one, other in zip(result[device], result[CPU], strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)
