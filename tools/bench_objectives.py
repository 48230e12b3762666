"""Measure objectives relative to exact reverse KL: one update's forward and backward of a random student.

    python tools/bench_objectives.py [--json] [--repeats 9]

Every objective accumulates the gradient of one micro-batch (16 responses of 128 tokens after prompts of 64; a
random Qwen3 of hidden size 256, 6 layers, V = 32768, tied; one teacher of the same size), interleaved in one
process with one thread; medians of CPU seconds and of the ratios to exact reverse KL in the same repetition.
The optimizer step, the same for all, is left out, which makes the ratios larger than a whole update's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mergeopd.batch.micro_batch import MicroBatch
from mergeopd.loss.divergence import JSD, ForwardKL, ReverseKL
from mergeopd.loss.heads import Head, Hidden
from mergeopd.loss.objective import DistillationObjective, build_objective
from mergeopd.loss.observe import observe
from mergeopd.loss.policy import ClipRatio, Correction, Credit, Policy, PolicyRows
from mergeopd.loss.support import Support
from mergeopd.recipe.training import Optimizer
from mergeopd.student.loss import Measured
from mergeopd.student.torch import TorchStudent
from mergeopd.types import token_ids

VOCAB, ANSWERS, PROMPT, RESPONSE, HIDDEN = 32768, 16, 64, 128, 256
CLIP, MASK = ClipRatio(0.2, 0.28), Correction("mask", 0.5, 2.0)


def student(folder: Path) -> TorchStudent:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return TorchStudent(
        folder, dtype="float32", num_valid=VOCAB, optimizer=Optimizer(), device=torch.device("cpu")
    )


def micro_batch() -> MicroBatch:
    """Build random responses, a teacher's hidden states, and all inputs of policy terms."""
    num = ANSWERS * RESPONSE
    rows = PolicyRows(
        own_N=torch.ones(num),
        outcome_N=torch.randn(num) / num,
        behaviour_N=torch.full((num,), -10.0),
        keep_N=torch.ones(num),
        old_N=torch.full((num,), -10.0),
    )
    ids = [token_ids(row.numpy()) for row in torch.randint(VOCAB, (ANSWERS, PROMPT + RESPONSE))]
    head = Head(torch.randn(VOCAB, HIDDEN) * 0.1)
    return MicroBatch(
        rollouts=tuple(range(ANSWERS)),
        teachers=("teacher",),
        prompts=tuple(row[:PROMPT] for row in ids),
        responses=tuple(row[PROMPT:] for row in ids),
        targets=(Hidden(torch.randn(num, HIDDEN), head),),
        teacher_weight_KN=torch.full((1, num), 1.0 / num),
        nll_weight_N=torch.zeros(num),
        policy=rows,
    )


def contestants(whole: MicroBatch) -> dict[str, tuple[DistillationObjective, MicroBatch]]:
    [hidden] = whole.targets
    assert isinstance(hidden, Hidden)
    labels = torch.tensor(np.concatenate(whole.labels), dtype=torch.long)
    written = replace(whole, targets=(observe(hidden.hidden, hidden.head, labels),))
    top = replace(whole, targets=(observe(hidden.hidden, hidden.head, labels, top_k=64),))
    reverse = {"reverse_kl": (ReverseKL(), 1.0)}
    outcome, sampled = Policy(clip=CLIP, correction=MASK), Policy(sampled=1.0, clip=CLIP, correction=MASK)
    return {
        "exact reverse KL": (build_objective(reverse), whole),
        "  + outcome, mask, clip": (build_objective(reverse, policy=outcome), whole),
        "  + outcome + sampled": (build_objective(reverse, policy=sampled), whole),
        "  top 16 of the student": (build_objective(reverse, support=Support(16, "student", "tail")), whole),
        "  top 64 of the teacher": (build_objective(reverse, support=Support(64, "teacher", "tail")), top),
        "exact forward KL": (build_objective({"forward_kl": (ForwardKL(), 1.0)}), whole),
        "exact JSD": (build_objective({"jsd": (JSD(0.5), 1.0)}), whole),
        "sampled (MOPD)": (build_objective({}, policy=sampled), written),
        "outcome, credit (RLSD)": (
            build_objective({}, policy=replace(outcome, anchor=Credit(0.5, 0.2))),
            written,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model, whole = student(Path(folder)), micro_batch()
        works: dict[str, Callable[[], object]] = {
            name: lambda objective=objective, micro=micro: model.accumulate_gradients([micro], objective)  # type: ignore[misc]
            for name, (objective, micro) in contestants(whole).items()
        }
        alone = replace(whole, targets=(), teachers=(), teacher_weight_KN=torch.zeros(0, ANSWERS * RESPONSE))
        works["look back"] = lambda: model.score([alone], Measured((), None, 1.0))
        figures = measure(works, arguments.repeats)
    if arguments.json:
        print(json.dumps(figures))
        return
    table = Table(title="one micro-batch, forward and backward", title_justify="left")
    for column, justify in (("objective", "left"), ("CPU s", "right"), ("ratio", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for name, row in figures.items():
        table.add_row(name, f"{row['seconds']:.2f}", f"{row['ratio']:.3f}")
    Console().print(table)


def measure(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Return medians of CPU seconds and of the ratio to the first of the same repetition."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            if turn:  # the first one warms up
                times[name].append(time.process_time() - start)
    first = next(iter(times.values()))
    return {
        name: {
            "seconds": median(values),
            "ratio": median(a / b for a, b in zip(values, first, strict=True)),
        }
        for name, values in times.items()
    }


if __name__ == "__main__":
    main()
