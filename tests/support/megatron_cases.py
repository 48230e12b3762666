"""Models, micro-batches and reference results for the Megatron tests; without importing Megatron."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mergeopd.batch.micro_batch import MicroBatch
from mergeopd.loss import ForwardKL, Head, Hidden, ReverseKL
from mergeopd.loss.objective import DistillationObjective, build_objective
from mergeopd.loss.policy import ClipRatio, Correction, Policy, PolicyRows
from mergeopd.recipe.training import Optimizer
from mergeopd.student.loss import Measured
from mergeopd.student.torch import TorchStudent
from mergeopd.types import TokenIds, token_flags, token_ids

CPU = torch.device("cpu")
ROWS, VALID = 37, 35  # rows of the head, which no grid divides, and the true vocabulary
LRS = (1e-3, 3e-3, 2e-3, 1e-3)
REVERSE = build_objective({"reverse_kl": (ReverseKL(), 1.0)})
MIXED = build_objective(
    {"reverse_kl": (ReverseKL(), 0.7), "forward_kl": (ForwardKL(), 0.1)},
    nll=0.2,
    policy=Policy(
        sampled=0.1, bound=5.0, clip=ClipRatio(0.2, 0.28), correction=Correction("mask", low=0.6, high=1.7)
    ),
)
ROPES = {
    "llama": {
        "rope_theta": 10000.0,
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
}


@dataclass(frozen=True)
class Case:
    """A job for the worker and for the torch student."""

    folder: Path
    objective: DistillationObjective
    updates: list[list[MicroBatch]]
    optimizer: Optimizer
    lrs: tuple[float, ...] = LRS
    num_valid: int = VALID
    dtype: str = "float32"
    sequence_parallel: bool = False
    split: bool = False
    recompute: bool = False
    fails: bool = False
    fused_norms: bool = False
    state: Path | None = None

    def job(self, export: Path) -> dict[str, object]:
        """The case as the worker reads it; its exports go to `export`."""
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
            "export": export,
        }


def write_dense(
    folder: Path,
    model_type: str,
    *,
    tied: bool,
    dtype: str = "float32",
    vocab: int = ROWS,
    eos: int = 2,
    seed: int = 5,
    layers: int = 4,
    spread: float = 0.15,
    **settings: object,
) -> Path:
    """Write a random model whose norms and biases differ from their initial values."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=vocab,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=spread,
        rms_norm_eps=1e-5,
        eos_token_id=eos,
        **({"head_dim": 16} if model_type in ("qwen3", "gemma2", "gemma3_text") else {}),
        **({"pad_token_id": 0} if model_type == "phi3" else {}),
        **settings,
        **({"rope_parameters": ROPES[model_type]} if model_type in ROPES else {}),
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def micro_batches(generator: torch.Generator, num: int, first: int = 0) -> list[MicroBatch]:
    """Micro-batches of different shapes and teachers; the second has tokens that are not trained."""

    def ids(length: int) -> TokenIds:
        return token_ids(torch.randint(VALID, (length,), generator=generator).numpy())

    heads = [torch.randn(ROWS, 8 + k, generator=generator) for k in range(2)]
    result = []
    for number in range(first, first + num):
        batch = 1 + number % 3
        prompts = tuple(ids(2 + (number + i) % 4) for i in range(batch))
        responses = tuple(ids(3 + (2 * number + i) % 5) for i in range(batch))
        trained = None
        if number == 1:
            trained = tuple(token_flags([t % 3 != 1 for t in range(len(r))]) for r in responses)
        n = sum(map(len, responses)) if trained is None else int(sum(flags.sum() for flags in trained))
        teachers = ("one", "two")[: 1 + number % 2]
        targets = tuple(
            Hidden(torch.randn(n, 8 + k, generator=generator), Head(heads[k], num_valid=VALID))
            for k in range(len(teachers))
        )
        weight = torch.rand(len(teachers), n, generator=generator) / 40
        nll = torch.rand(n, generator=generator) / 40
        result.append(
            MicroBatch(tuple(range(batch)), teachers, prompts, responses, targets, weight, nll, None, trained)
        )
    return result


def with_policy(
    micro_batches: list[MicroBatch], student: TorchStudent, generator: torch.Generator
) -> list[MicroBatch]:
    """Outcome advantages of both signs; behaviour log-probs around the student's own, some outside the mask."""
    result = []
    for micro in micro_batches:
        [stats] = student.score([micro], Measured((), None, 1.0))
        now = stats.logprob_S
        n = len(now)
        rows = PolicyRows(
            own_N=(torch.rand(n, generator=generator) < 0.8).float(),
            outcome_N=torch.randn(n, generator=generator) / 40,
            behaviour_N=now + 0.5 * torch.randn(n, generator=generator),
            keep_N=(torch.rand(n, generator=generator) < 0.9).float(),
            old_N=now + 0.1 * torch.randn(n, generator=generator),
        )
        result.append(replace(micro, policy=rows))
    return result


def torch_student(case: Case) -> TorchStudent:
    """The reference for `case`, untrained."""
    return TorchStudent(
        case.folder, dtype=case.dtype, num_valid=case.num_valid, optimizer=case.optimizer, device=CPU
    )


@dataclass(frozen=True)
class Trajectory:
    """Losses and norms of the updates, the first raw gradient, the last weights; a further first update."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    next_loss: float
    next_norm: float


def trained(case: Case) -> Trajectory:
    """Train the torch student with the updates of `case`."""
    student = torch_student(case)
    losses, norms, gradients = [], [], {}
    for micro_batches, lr in zip(case.updates, case.lrs, strict=True):
        losses.append(
            sum(float(s.loss.sum()) for s in student.accumulate_gradients(micro_batches, case.objective))
        )
        gradients = gradients or {name: g.clone() for name, g in student.gradients().items()}
        norms.append(student.optimizer_step(lr))
    weights = {name: w.clone() for name, w in student.folder_weights()}
    next_loss = sum(
        float(s.loss.sum()) for s in student.accumulate_gradients(case.updates[0], case.objective)
    )
    return Trajectory(losses, norms, gradients, weights, next_loss, student.optimizer_step(1e-3))
