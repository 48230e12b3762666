"""Measure time and memory of `fused_loss`, relative to its four necessary matrix products.

    python tools/bench_loss.py [--json]

Times are interleaved medians of one process with one thread: the floor (the four products, tiled over tokens,
into fixed buffers), the kernel (forward and backward) without and with the overlap of every so many tokens,
and full logits with autograd for comparison. The peak
is the increase of a new process's resident anonymous memory during a first call, without the returned
gradients.
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
    BlockStats,
    Divergence,
    ForwardKL,
    Head,
    Hidden,
    ReverseKL,
    Workspace,
    fused_loss,
)

DIVERGENCES: dict[str, Divergence] = {"reverse_kl": ReverseKL(), "forward_kl": ForwardKL(), "jsd": JSD(0.5)}


class Problem:
    """Random hidden states and heads, fp32, one teacher."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.num, self.vocab, self.chunk_rows = arguments.tokens, arguments.vocab, arguments.chunk_rows
        self.divergence = DIVERGENCES[arguments.divergence]
        self.hidden = torch.randn(self.num, arguments.d_student, requires_grad=True)
        self.weight = (torch.randn(self.vocab, arguments.d_student) * 0.1).requires_grad_()
        self.hidden_T = torch.randn(self.num, arguments.d_teacher)
        self.weight_T = torch.randn(self.vocab, arguments.d_teacher) * 0.1
        self.labels = torch.randint(self.vocab, (self.num,))
        self.overlap_rows = torch.arange(0, self.num, arguments.overlap_every)
        self.workspace = Workspace()

    def overlap(self) -> None:
        """Run the kernel with the overlap of some tokens, as training does."""
        self.fused(self.overlap_rows)

    def fused(self, overlap_rows: Tensor | None = None) -> None:
        """Run the kernel forward and backward with new gradients."""
        self.hidden.grad = self.weight.grad = None

        def objective(stats: BlockStats, rows: slice) -> Tensor:
            return stats.divergence[0, 0].div(self.num)

        loss, _ = fused_loss(
            self.hidden,
            Head(self.weight),
            [Hidden(self.hidden_T, Head(self.weight_T))],
            self.labels,
            objective,
            divergences=[self.divergence],
            chunk_rows=self.chunk_rows,
            workspace=self.workspace,
            overlap_rows=overlap_rows,
        )
        torch.autograd.backward(loss)

    def floor(self) -> Callable[[], None]:
        """Return a function that runs only the four products of every tile, in preallocated memory."""
        rows = self.chunk_rows
        hidden, weight = self.hidden.detach(), self.weight.detach()
        logits, logits_T = torch.zeros(rows, self.vocab), torch.zeros(rows, self.vocab)
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
        log_S = torch.log_softmax(self.hidden @ self.weight.t(), 1)
        with torch.no_grad():
            log_T = torch.log_softmax(self.hidden_T @ self.weight_T.t(), 1)
        match self.divergence:
            case ReverseKL():
                density = log_S.exp() * (log_S - log_T)
            case ForwardKL():
                density = log_T.exp() * (log_T - log_S)
            case JSD(beta):
                log_M = (beta * log_T.exp() + (1 - beta) * log_S.exp()).log()
                density = beta * log_T.exp() * (log_T - log_M) + (1 - beta) * log_S.exp() * (log_S - log_M)
        torch.autograd.backward(density.sum().div(self.num))


def interleaved(contestants: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Return median seconds of each after one warm-up, interleaved, so that slow periods affect all."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for contestant in contestants.values():
        contestant()
    for _ in range(repeats):
        for name, contestant in contestants.items():
            start = time.perf_counter()
            contestant()
            times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


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
    outputs = 4 * (problem.hidden.numel() + problem.weight.numel())
    return peak_of(getattr(problem, arguments.peak)) - outputs


def peak_in_fresh_process(arguments: argparse.Namespace, which: str) -> int:
    """Run this file in a new process, for one first call."""
    options = [
        f"--{name.replace('_', '-')}={getattr(arguments, name)}"
        for name in ("tokens", "vocab", "d_student", "d_teacher", "chunk_rows", "divergence")
    ]
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
    parser.add_argument("--chunk-rows", type=int, default=256)
    parser.add_argument("--divergence", choices=sorted(DIVERGENCES), default="reverse_kl")
    parser.add_argument("--overlap-every", type=int, default=8, help="tokens per token with an overlap")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--peak", choices=["fused", "naive"], help=argparse.SUPPRESS)
    return parser.parse_args()


def show(result: dict[str, Any]) -> None:
    table = Table(title="forward and backward, one thread, fp32")
    for column in ("", "seconds", "x floor", "peak extra MiB"):
        table.add_column(column, justify="right" if column else "left")
    rows = [
        ("four matrix products (floor)", result["floor_s"], None),
        ("fused_loss", result["fused_s"], result["peak_extra_bytes"]),
        ("fused_loss with overlaps", result["overlap_s"], None),
        ("full logits and autograd", result["naive_s"], result["naive_peak_extra_bytes"]),
    ]
    for name, seconds, peak in rows:
        memory = "-" if peak is None else f"{peak / 2**20:.0f}"
        table.add_row(name, f"{seconds:.3f}", f"{seconds / result['floor_s']:.3f}", memory)
    console = Console()
    console.print(table)
    console.print(", ".join(f"{name}={value}" for name, value in result["conditions"].items()))


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    if arguments.peak:
        sys.stdout.write(f"{measure_peak(arguments)}\n")
        return
    problem = Problem(arguments)
    contestants = {
        "floor": problem.floor(),
        "fused": problem.fused,
        "overlap": problem.overlap,
        "naive": problem.naive,
    }
    seconds = interleaved(contestants, arguments.repeats)
    result = {
        "ratio_to_floor": round(seconds["fused"] / seconds["floor"], 4),
        "peak_extra_bytes": peak_in_fresh_process(arguments, "fused"),
        "overlap_ratio_to_fused": round(seconds["overlap"] / seconds["fused"], 4),
        "overlap_s": round(seconds["overlap"], 4),
        "fused_s": round(seconds["fused"], 4),
        "floor_s": round(seconds["floor"], 4),
        "naive_s": round(seconds["naive"], 4),
        "naive_peak_extra_bytes": peak_in_fresh_process(arguments, "naive"),
        "conditions": {
            "tokens": arguments.tokens,
            "vocab": arguments.vocab,
            "d_student": arguments.d_student,
            "d_teacher": arguments.d_teacher,
            "dtype": "float32",
            "threads": 1,
            "chunk_rows": arguments.chunk_rows,
            "divergence": arguments.divergence,
            "overlap_every": arguments.overlap_every,
            "repeats": arguments.repeats,
            "torch": torch.__version__,
        },
    }
    if arguments.json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        show(result)


if __name__ == "__main__":
    main()
