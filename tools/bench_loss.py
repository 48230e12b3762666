"""Measure time and memory of `fused_loss`, relative to its four necessary matrix products, beside its peers.

    python tools/bench_loss.py [--json] [--clock cpu]
    python tools/bench_loss.py --device cuda --dtype bfloat16 --tokens 16384 --vocab 151936 \\
        --d-student 4096 --d-teacher 4096

All in one process, with one thread on a CPU, by turns: the floor (the four products, tiled over tokens, into
fixed buffers), the kernels (forward and backward, the head's gradient added to a sum as in training) without
and with the overlap of every so many tokens, TRL's and Liger's losses where they are installed, and full
logits with autograd. A ratio is the median over the rounds, of the time over that of the floor in the same
round; beside it its range. The peak is the increase of a new process's resident anonymous memory during a
first call, or of the GPU's allocated memory, without the gradients. A GPU also reports the kernel `torch`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mergeopd.loss import (
    JSD,
    Divergence,
    ForwardKL,
    Head,
    Hidden,
    ReverseKL,
    Workspace,
    build_objective,
    fused_loss,
)
from mergeopd.loss.kernel_choice import KernelName
from mergeopd.loss.slicing import rows_in_chunk

DIVERGENCES: dict[str, Divergence] = {"reverse_kl": ReverseKL(), "forward_kl": ForwardKL(), "jsd": JSD(0.5)}


Work = Callable[[], None]
BETAS = {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": 0.5}  # of TRL and Liger


class Problem:
    """Random hidden states and heads, one teacher."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.arguments, self.device = arguments, torch.device(arguments.device)
        self.num, self.vocab, self.chunk_rows = arguments.tokens, arguments.vocab, arguments.chunk_rows
        self.divergence = DIVERGENCES[arguments.divergence]
        dtype: torch.dtype = getattr(torch, arguments.dtype)
        options: dict[str, Any] = {"device": self.device, "dtype": dtype}
        self.hidden = torch.randn(self.num, arguments.d_student, **options).requires_grad_()
        self.weight = (torch.randn(self.vocab, arguments.d_student, **options) * 0.1).requires_grad_()
        self.hidden_T = torch.randn(self.num, arguments.d_teacher, **options)
        self.weight_T = torch.randn(self.vocab, arguments.d_teacher, **options) * 0.1
        self.labels = torch.randint(self.vocab, (self.num,), device=self.device)
        self.weight_grad = torch.zeros_like(self.weight, dtype=torch.float32)
        self.overlap_rows = torch.arange(0, self.num, arguments.overlap_every)
        objective = build_objective({arguments.divergence: (self.divergence, 1.0)})
        self.objective = objective.mean_over(torch.ones(self.num, device=self.device))
        self.workspace = Workspace()

    def overlap(self) -> None:
        """Run the kernel with the overlap of some tokens, as training does."""
        self.fused(self.overlap_rows)

    def torch_kernel(self) -> None:
        self.fused(kernel="torch")

    def fused(self, overlap_rows: Tensor | None = None, kernel: KernelName = "auto") -> None:
        """Run the kernel forward and backward."""
        self.hidden.grad = None
        loss, _ = fused_loss(
            self.hidden,
            Head(self.weight, weight_grad=self.weight_grad),
            [Hidden(self.hidden_T, Head(self.weight_T))],
            self.labels,
            self.objective,
            divergences=[self.divergence],
            chunk_rows=self.chunk_rows,
            workspace=self.workspace,
            overlap_rows=overlap_rows,
            kernel=kernel,
        )
        torch.autograd.backward(loss)

    def floor(self) -> Work:
        """Return a function that runs only the four products of every tile, in preallocated memory."""
        rows = self.chunk_rows or rows_in_chunk(self.device, self.vocab, torch.float32)
        hidden, weight = self.hidden.detach(), self.weight.detach()
        logits, logits_T = (torch.zeros(rows, self.vocab).to(hidden) for _ in range(2))
        d_hidden, d_weight = torch.zeros_like(hidden), torch.zeros_like(weight)

        def products() -> None:
            for start in range(0, self.num, rows):
                tile = slice(start, min(start + rows, self.num))
                num = tile.stop - tile.start
                torch.mm(hidden[tile], weight.t(), out=logits[:num])
                torch.mm(self.hidden_T[tile], self.weight_T.t(), out=logits_T[:num])
                torch.mm(logits[:num], weight, out=d_hidden[tile])
                d_weight.addmm_(logits[:num].t(), hidden[tile])

        return products

    def naive(self) -> None:
        self.hidden.grad = self.weight.grad = None
        log_S = torch.log_softmax((self.hidden @ self.weight.t()).float(), 1)
        with torch.no_grad():
            log_T = torch.log_softmax((self.hidden_T @ self.weight_T.t()).float(), 1)
        match self.divergence:
            case ReverseKL():
                density = log_S.exp() * (log_S - log_T)
            case ForwardKL():
                density = log_T.exp() * (log_T - log_S)
            case JSD(beta):
                log_M = (beta * log_T.exp() + (1 - beta) * log_S.exp()).log()
                density = beta * log_T.exp() * (log_T - log_M) + (1 - beta) * log_S.exp() * (log_S - log_M)
        torch.autograd.backward(density.sum().div(self.num))

    def trl(self) -> Work:
        """Return TRL's chunked divergence. Raises ImportError where it is not installed."""
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        mask = torch.ones(1, self.num, device=self.device)
        beta = BETAS[self.arguments.divergence]

        def step() -> None:
            self.hidden.grad = self.weight.grad = None
            states = (self.hidden[None], self.hidden_T[None], self.weight, self.weight_T)
            loss, _, _ = _chunked_divergence_loss(*states, mask, beta)
            torch.autograd.backward(loss)

        return step

    def liger(self) -> Work:
        """Return Liger's fused linear JSD, compiled on a GPU. Raises ImportError where it is missing."""
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss_of = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0,
            weight_soft_loss=1.0,
            beta=BETAS[self.arguments.divergence],
            compiled=self.device.type == "cuda",
            chunk_size=self.chunk_rows or 1024,
        )

        def step() -> None:
            self.hidden.grad = self.weight.grad = None
            loss = loss_of(self.hidden, self.weight, self.hidden_T, self.weight_T, self.labels)
            torch.autograd.backward(loss)

        return step

    def contestants(self) -> tuple[dict[str, Work], dict[str, str]]:
        """Return what runs here by name, and why the others do not."""
        running: dict[str, Work] = {"floor": self.floor(), "fused": self.fused, "overlap": self.overlap}
        if self.device.type == "cuda":
            running["fused, torch"] = self.torch_kernel
        skipped = {}
        for name in self.arguments.peers:
            make = {"trl": self.trl, "liger": self.liger}[name]
            try:
                running[name] = make()
                running[name]()
            except (ImportError, RuntimeError) as error:
                running.pop(name, None)
                skipped[name] = f"not run: {str(error).splitlines()[0]}"
        running["naive"] = self.naive
        return running, skipped


def interleaved(contestants: dict[str, Work], repeats: int, clock: str) -> dict[str, list[float]]:
    """Return the seconds of each after one warm-up, interleaved, so that slow periods affect all."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    now = time.process_time if clock == "cpu" else time.perf_counter
    for contestant in contestants.values():
        contestant()
    for _ in range(repeats):
        for name, contestant in contestants.items():
            _wait()
            start = now()
            contestant()
            _wait()
            times[name].append(now() - start)
    return times


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def anonymous_bytes() -> int:
    """Return the resident anonymous memory of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status: peak memory is measured on Linux only")


def peak_of(work: Callable[[], None]) -> int:
    """Return the peak increase of resident anonymous bytes during `work`, sampled every millisecond."""
    done, peak, before = threading.Event(), 0, anonymous_bytes()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    peak = max(peak, anonymous_bytes())
    done.set()
    watcher.join()
    return peak - before


def measure_peak(arguments: argparse.Namespace) -> int:
    """Return the peak in this (new) process, without the gradients that the caller keeps."""
    # Warm up with a small problem: thread pools and MKL's own buffers are not part of the kernel.
    small = argparse.Namespace(**{**vars(arguments), "tokens": 8, "vocab": 64})
    getattr(Problem(small), arguments.peak)()
    problem = Problem(arguments)
    problem.weight_grad.fill_(0.0)  # its pages are the caller's
    outputs = problem.hidden.nbytes + (0 if arguments.peak == "fused" else problem.weight.nbytes)
    if problem.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        getattr(problem, arguments.peak)()
        return torch.cuda.max_memory_allocated() - before - outputs
    return peak_of(getattr(problem, arguments.peak)) - outputs


def peak_in_fresh_process(arguments: argparse.Namespace, which: str) -> int:
    """Run this file in a new process, for one first call."""
    names = ("tokens", "vocab", "d_student", "d_teacher", "chunk_rows", "divergence", "device", "dtype")
    values = {name: getattr(arguments, name) for name in names}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]
    command = [sys.executable, __file__, f"--peak={which}", *options]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def parse() -> argparse.Namespace:
    """Parse the command line; the defaults are the conditions of docs/benchmarks.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--d-student", type=int, default=256)
    parser.add_argument("--d-teacher", type=int, default=384)
    parser.add_argument("--chunk-rows", type=int, help="default: 256 on a CPU, by memory on a GPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu for a shared machine")
    parser.add_argument("--divergence", choices=sorted(DIVERGENCES), default="reverse_kl")
    parser.add_argument("--overlap-every", type=int, default=8, help="tokens per token with an overlap")
    parser.add_argument("--peers", nargs="*", choices=["trl", "liger"], default=["trl", "liger"])
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--peak", choices=["fused", "naive"], help=argparse.SUPPRESS)
    return parser.parse_args()


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    conditions = result["conditions"]
    table = Table(title=f"forward and backward, {conditions['dtype']}, {conditions['device']}")
    for column in ("", "seconds", "x floor", "range", "peak extra MiB"):
        table.add_column(column, justify="right" if column else "left")
    names = {
        "floor": "four matrix products (floor)",
        "fused": "fused_loss",
        "overlap": "fused_loss with overlaps",
        "naive": "full logits and autograd",
        "trl": "TRL",
        "liger": "Liger",
    }
    for name, one in result["contestants"].items():
        peak = result["peak_extra_bytes"] if name == "fused" else None
        peak = result["naive_peak_extra_bytes"] if name == "naive" else peak
        memory = "-" if peak is None else f"{peak / 2**20:.0f}"
        low, high = one["range"]
        spread = f"{low:.2f} to {high:.2f}"
        table.add_row(names.get(name, name), f"{one['seconds']:.3f}", f"{one['ratio']:.3f}", spread, memory)
    console = Console()
    console.print(table)
    for name, why in result["not_run"].items():
        console.print(f"{names[name]}: {why}")
    console.print(", ".join(f"{name}={value}" for name, value in conditions.items()))


def figures(times: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Return median seconds, the median ratio to the floor of the same round, and the ratio's range."""
    result = {}
    for name, values in times.items():
        ratios = [value / floor for value, floor in zip(values, times["floor"], strict=True)]
        result[name] = {
            "seconds": round(median(values), 4),
            "ratio": round(median(ratios), 4),
            "range": [round(min(ratios), 4), round(max(ratios), 4)],
        }
    return result


def main() -> None:
    arguments = parse()
    if arguments.chunk_rows is None and arguments.device == "cpu":
        arguments.chunk_rows = 256
    torch.set_num_threads(1)
    if arguments.peak:
        sys.stdout.write(f"{measure_peak(arguments)}\n")
        return
    running, skipped = Problem(arguments).contestants()
    contestants = figures(interleaved(running, arguments.repeats, arguments.clock))
    names = ("tokens", "vocab", "d_student", "d_teacher", "dtype", "device", "chunk_rows", "divergence")
    result = {
        "ratio_to_floor": contestants["fused"]["ratio"],
        "contestants": contestants,
        "not_run": skipped,
        "peak_extra_bytes": peak_in_fresh_process(arguments, "fused"),
        "naive_peak_extra_bytes": peak_in_fresh_process(arguments, "naive"),
        "conditions": {
            name: getattr(arguments, name) for name in (*names, "overlap_every", "repeats", "clock")
        }
        | {"threads": 1, "torch": torch.__version__},
    }
    if arguments.json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        show(result)


if __name__ == "__main__":
    main()
