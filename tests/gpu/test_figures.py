"""Speed of the device: the kernel against its matrix products, sampling, and the quickstart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from mergeopd.loss import (
    JSD,
    Divergence,
    ForwardKL,
    Head,
    Hidden,
    ReverseKL,
    Workspace,
    fused_loss,
)
from mergeopd.loss.objective import LinearObjective
from mergeopd.loss.slicing import rows_in_chunk
from mergeopd.rollout.sampling import sample

DIVERGENCES: dict[str, Divergence] = {"reverse_kl": ReverseKL(), "forward_kl": ForwardKL(), "jsd": JSD(0.5)}
ROOT = Path(__file__).parents[2]
REPEATS = 5
STOPPED = 3  # exit code of a run that was asked to stop


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Median over some repetitions, after one to warm up."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int | None:
    """Peak of device memory during `work`, minus the memory in use before."""
    if device.type != "cuda":
        work()
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Problem:
    """Random hidden states and heads in bfloat16; one teacher."""

    def __init__(self, device: torch.device, num: int, width: int, vocab: int) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

        self.num, self.vocab, self.device = num, vocab, device
        self.hidden, self.weight = randn(num, width).requires_grad_(), randn(vocab, width).mul_(0.02)
        self.weight.requires_grad_()
        self.hidden_T, self.weight_T = randn(num, width), randn(vocab, width).mul_(0.02)
        self.labels = torch.randint(vocab, (num,), device=device, generator=generator)
        self.weight_grad = torch.zeros(vocab, width, device=device)
        self.workspace = Workspace()

    def fused(self, divergence: Divergence, chunk_rows: int | None) -> None:
        """Forward and backward; the head's gradient is added to a float32 sum, as in training."""
        self.hidden.grad = None

        weight = torch.full((1, 1, self.num), 1.0 / self.num, device=self.device)
        loss, _ = fused_loss(
            self.hidden,
            Head(self.weight, weight_grad=self.weight_grad),
            [Hidden(self.hidden_T, Head(self.weight_T))],
            self.labels,
            LinearObjective(weight, None),
            divergences=[divergence],
            chunk_rows=chunk_rows,
            workspace=self.workspace,
        )
        loss.backward()

    def products(self, rows: int) -> Callable[[], None]:
        """The four matrix products that any such loss takes, chunk by chunk, and nothing else."""
        hidden, weight = self.hidden.detach(), self.weight.detach()
        dz = torch.zeros(rows, self.vocab, device=self.device, dtype=torch.bfloat16)

        def work() -> None:
            for start in range(0, self.num, rows):
                tile = slice(start, min(start + rows, self.num))
                own = dz[: tile.stop - tile.start]
                torch.mm(hidden[tile], weight.t())
                torch.mm(self.hidden_T[tile], self.weight_T.t())
                torch.mm(own, weight)
                torch.mm(own.t(), hidden[tile])

        return work


def test_kernel_against_its_products(device: torch.device, record: Callable[[str, object], None]) -> None:
    on_gpu = device.type == "cuda"
    num, width, vocab = (16384, 4096, 151936) if on_gpu else (300, 64, 1500)
    problem = Problem(device, num, width, vocab)
    rows = rows_in_chunk(device, vocab, torch.float32)
    floor = seconds(device, problem.products(rows))
    result: dict[str, Any] = {
        "tokens": num, "width": width, "vocabulary": vocab, "dtype": "bfloat16",
        "chunk_rows": rows, "products_seconds": floor,
        "products_tflops": 8 * num * width * vocab / floor / 1e12,
    }  # fmt: skip
    for name, divergence in DIVERGENCES.items():
        peak = peak_bytes(device, lambda d=divergence: problem.fused(d, None))  # type: ignore[misc]
        taken = seconds(device, lambda d=divergence: problem.fused(d, None))  # type: ignore[misc]
        result[name] = {
            "seconds": taken, "ratio_to_products": taken / floor, "tokens_per_second": num / taken,
            "first_call_peak_bytes": peak, "workspace_bytes": problem.workspace.num_bytes,
        }  # fmt: skip
        problem.workspace = Workspace()
    result["seconds_by_chunk_rows"] = {
        str(rows): seconds(device, lambda r=rows: problem.fused(ReverseKL(), r))  # type: ignore[misc]
        for rows in (256, 1024, 4096)
    }
    if on_gpu:
        result["accumulate_in_product"] = accumulation(problem, rows)
    record("kernel", result)
    assert bool(torch.isfinite(problem.weight_grad).all())
    assert not on_gpu or result["reverse_kl"]["ratio_to_products"] < 10


def test_loss_beside_trl_and_liger(device: torch.device, record: Callable[[str, object], None]) -> None:
    """The tool of docs/benchmarks.md: floor, both kernels and the peers that are installed, in one run."""
    sizes = "--tokens 16384 --vocab 151936 --d-student 4096 --d-teacher 4096 --dtype bfloat16"
    if device.type != "cuda":
        sizes = "--tokens 256 --vocab 1500 --d-student 16 --d-teacher 16 --repeats 1"
    for divergence in ("reverse_kl", "jsd"):
        options = [*sizes.split(), "--device", device.type, "--divergence", divergence, "--json"]
        done = subprocess.run(
            [sys.executable, ROOT / "tools" / "bench_loss.py", *options],
            env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        record(f"loss_{divergence}", json.loads(done.stdout.splitlines()[-1]))


def accumulation(problem: Problem, rows: int) -> dict[str, Any]:
    """Whether torch adds a half-precision product to a float32 sum in one kernel, and the time that saves."""
    dz = torch.zeros(rows, problem.vocab, device=problem.device, dtype=torch.bfloat16)
    hidden, total = problem.hidden.detach()[:rows], problem.weight_grad
    result: dict[str, Any] = {
        "two_kernels_seconds": seconds(
            problem.device, lambda: total.add_(torch.mm(dz.t(), hidden, out_dtype=torch.float32))
        )
    }
    try:
        result["one_kernel_seconds"] = seconds(
            problem.device,
            lambda: torch.addmm(total, dz.t(), hidden, out_dtype=torch.float32, out=total),
        )
    except (RuntimeError, TypeError) as error:
        result["one_kernel_error"] = str(error).splitlines()[0]
    return result


def test_sampling(device: torch.device, record: Callable[[str, object], None]) -> None:
    """One decoding step without the model: 256 sequences over a large vocabulary."""
    rows, vocab = (256, 151936) if device.type == "cuda" else (8, 1500)
    logits = torch.randn(rows, vocab, device=device)
    uniform = torch.rand(rows, device=device, dtype=torch.float64)
    settings = {"greedy_seconds": (0.0, 1.0), "plain_seconds": (1.0, 1.0), "top_p_seconds": (1.0, 0.9)}
    taken = {
        name: seconds(device, lambda s=one: sample(logits, uniform, *s))  # type: ignore[misc]
        for name, one in settings.items()
    }
    record("sampling", {"rows": rows, "vocabulary": vocab, **taken})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quickstart(
    project: Path,
    command: Callable[..., float],
    shortened: Callable[..., list[str]],
    record: Callable[[str, object], None],
    dtype: str,
) -> None:
    """Run, stop and resume. MERGEOPD_GPU_WHOLE=1 makes all updates, in float32."""
    whole = os.environ.get("MERGEOPD_GPU_WHOLE") == "1" and dtype == "float32"
    updates, output = 240 if whole else 12, f"runs/{dtype}"
    precision = f"student.dtype={dtype}"
    options = shortened(output, updates, 256, precision)
    if whole:
        options = ["--set", f"output={output}", "--set", precision]
    run = ("-m", "mergeopd", "run", "recipes/quickstart.yaml", *options)
    taken = command(*run, "--updates", "5", cwd=project, returns=STOPPED)
    taken += command(*run, cwd=project)
    records = [json.loads(line) for line in (project / output / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((project / output / "result.json").read_text())
    assert len(records) == updates
    # The first updates of a process pay for what is loaded and compiled once.
    steady = records[4:]
    spent = sum(sum(r["cost"]["seconds"].values()) for r in steady)
    measured = {
        "updates": len(records),
        "seconds": taken,
        "updates_per_second": len(steady) / spent,
        "seconds_by_stage": result["seconds"],
        "domains": result["suites"],
        "mean_recovered": result["mean_recovered"],
        "last_loss": records[-1]["loss"],
    }
    record(f"quickstart_{dtype}", measured)
