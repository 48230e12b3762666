"""Measure the time of `bridge_loss`, compared with its necessary matrix products and with plain autograd.

    python tools/bench_bridge.py [--kinds gold uld forward reverse] [--json]

Times are interleaved medians of one process, for forward and backward together: the floor (the four products
that every such loss needs, tiled, into fixed buffers), `bridge_loss`, and the gather form of the same loss
(full logits, log_softmax, index selection, sort, autograd). `--clock cpu` takes processor seconds, for shared
machines. Hidden states, heads and maps are random; every eighth group has two tokens on one side. `of_floor`
is bridge_loss / floor, `speedup` is gather / bridge_loss, and `excess_speedup` the ratio of the times above
the floor.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mergeopd.loss import Head, Hidden, Workspace
from mergeopd.loss.cross_tokenizer import (
    Bridge,
    ExactPairs,
    Gold,
    Groups,
    Projected,
    SparseMap,
    Uld,
    bridge_loss,
)


class Problem:
    """Random models, fp32, and groups of which every eighth has two tokens on one side."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        g = torch.Generator().manual_seed(0)
        num = arguments.groups
        self.vocab_S, self.vocab_T, self.chunk_rows = (
            arguments.vocab_s,
            arguments.vocab_t,
            arguments.chunk_rows,
        )
        num_S, num_T = torch.ones(2, num, dtype=torch.int64)
        num_S[::16], num_T[8::16] = 2, 2
        self.groups = Groups(num_S.cumsum(0) - num_S, num_S, num_T.cumsum(0) - num_T, num_T)
        rows_S, rows_T = int(num_S.sum()), int(num_T.sum())
        self.hidden = torch.randn(rows_S, arguments.d_student, generator=g).requires_grad_()
        self.weight = (torch.randn(self.vocab_S, arguments.d_student, generator=g) * 0.1).requires_grad_()
        self.hidden_T = torch.randn(rows_T, arguments.d_teacher, generator=g)
        self.weight_T = torch.randn(self.vocab_T, arguments.d_teacher, generator=g) * 0.1
        self.labels_S = torch.randint(self.vocab_S, (rows_S,), generator=g)
        self.labels_T = torch.randint(self.vocab_T, (rows_T,), generator=g)
        self.weight_G = torch.full((num,), 1.0 / num)
        shared = round(min(self.vocab_S, self.vocab_T) * arguments.shared)
        ids_S = torch.randperm(self.vocab_S, generator=g)[:shared]
        ids_T = torch.randperm(self.vocab_T, generator=g)[:shared]
        self.pairs = ExactPairs(ids_S, ids_T, self.vocab_S, self.vocab_T)
        ids = torch.randint(self.vocab_T, (self.vocab_S, 4), generator=g)
        weights = torch.full((self.vocab_S, 4), 0.25)
        ids[ids_S, 0], weights[ids_S] = ids_T, torch.eye(1, 4)
        self.table = SparseMap(ids, weights, self.vocab_T)
        self.workspace = Workspace()

    def bridge(self, kind: str) -> Bridge:
        """Build the bridge of that name with its default settings."""
        kinds: dict[str, Callable[[], Bridge]] = {
            "gold": lambda: Gold(self.pairs),
            "uld": lambda: Uld(),
            "forward": lambda: Projected(self.table, "forward"),
            "reverse": lambda: Projected(self.table, "reverse"),
        }
        return kinds[kind]()

    def fused(self, bridge: Bridge) -> float:
        """Run the kernel forward and backward with new gradients; return the loss."""
        self.hidden.grad = self.weight.grad = None
        loss, _ = bridge_loss(
            self.hidden,
            Head(self.weight),
            Hidden(self.hidden_T, Head(self.weight_T)),
            self.groups,
            self.labels_S,
            self.labels_T,
            bridge,
            self.weight_G,
            chunk_rows=self.chunk_rows,
            workspace=self.workspace,
        )
        torch.autograd.backward(loss)
        return loss.item()

    def gather(self, bridge: Bridge) -> float:
        """Compute the same loss from full logits, vectorised over groups, with autograd."""
        self.hidden.grad = self.weight.grad = None
        log_S = torch.log_softmax(self.hidden @ self.weight.t(), 1)
        with torch.no_grad():
            log_T = torch.log_softmax(self.hidden_T @ self.weight_T.t(), 1)
        groups = self.groups
        if isinstance(bridge, Projected):
            value = _projected(bridge, log_S, log_T, groups)
        else:
            q_S = _observed(log_S, self.labels_S, groups.first_S, groups.num_S)
            q_T = _observed(log_T, self.labels_T, groups.first_T, groups.num_T)
            value = _ranked(bridge, q_S, q_T)
        loss = (value * self.weight_G).sum()
        torch.autograd.backward(loss)
        return loss.item()

    def floor(self) -> Callable[[], None]:
        """Return a function that runs only the four products of every tile, in preallocated memory."""
        rows = self.chunk_rows
        hidden, weight = self.hidden.detach(), self.weight.detach()
        logits, logits_T = torch.zeros(rows, self.vocab_S), torch.zeros(rows, self.vocab_T)
        d_hidden, d_weight = torch.zeros_like(hidden), torch.zeros_like(weight)

        def products() -> None:
            for start in range(0, len(hidden), rows):
                tile = slice(start, min(start + rows, len(hidden)))
                num = tile.stop - tile.start
                torch.mm(hidden[tile], weight.t(), out=logits[:num])
                torch.mm(logits[:num], weight, out=d_hidden[tile])
                d_weight.addmm_(logits[:num].t(), hidden[tile])
            for start in range(0, len(self.hidden_T), rows):
                tile_T = self.hidden_T[start : start + rows]
                torch.mm(tile_T, self.weight_T.t(), out=logits_T[: len(tile_T)])

        return products


def _observed(log_p: Tensor, labels: Tensor, first: Tensor, num: Tensor) -> Tensor:
    """Logarithms of the merged distributions of groups of one or two rows."""
    second = (first + 1).clamp(max=len(labels) - 1)
    later = torch.where(num > 1, log_p[second, labels[second]], 0.0)
    return log_p.index_select(0, first) + later.unsqueeze(1)


def _ranked(bridge: Bridge, log_S: Tensor, log_T: Tensor) -> Tensor:
    value = torch.zeros(len(log_S))
    weight = 1.0
    if isinstance(bridge, Gold):
        pairs, beta = bridge.pairs, bridge.beta
        a, b = log_S.index_select(1, pairs.ids_S), log_T.index_select(1, pairs.ids_T)
        mean = (beta * b.exp() + (1 - beta) * a.exp()).log()
        jsd = (beta * b.exp() * (b - mean) + (1 - beta) * a.exp() * (a - mean)).sum(1)
        weight = 1.0 - len(pairs.ids_T) / pairs.vocab_T
        value = (1.0 - weight) * jsd
        log_S, log_T = log_S.index_select(1, pairs.rest_S), log_T.index_select(1, pairs.rest_T)
    q_S = log_S.exp().sort(dim=1, descending=True).values
    q_T = log_T.exp().sort(dim=1, descending=True).values
    size = max(q_S.shape[1], q_T.shape[1])
    q_S, q_T = (torch.nn.functional.pad(q, (0, size - q.shape[1])) for q in (q_S, q_T))
    return value + weight * (q_S - q_T).abs().sum(1)


def _projected(bridge: Projected, log_S: Tensor, log_T: Tensor, groups: Groups) -> Tensor:
    """The sparse product as gather and scatter; means over groups of one or two rows."""
    table = bridge.table
    student, slot = (table.weights > 0).nonzero(as_tuple=True)
    column = torch.searchsorted(table.covered, table.ids[student, slot])
    entering = log_S.exp().index_select(1, student) * table.weights[student, slot]
    projected = torch.zeros(len(log_S), len(table.covered)).index_add(1, column, entering)
    log_a = projected.clamp(min=torch.finfo(torch.float32).tiny).log()
    log_b = log_T.index_select(1, table.covered)
    a, b = (
        0.5 * (rows.index_select(0, first) + rows.index_select(0, first + num - 1))
        for rows, first, num in (
            (log_a, groups.first_S, groups.num_S),
            (log_b, groups.first_T, groups.num_T),
        )
    )
    if bridge.direction == "forward":
        return (b.exp() * (b - a) - b.exp() + a.exp()).sum(1)
    return (a.exp() * (a - b) - a.exp() + b.exp()).sum(1)


def interleaved(
    contestants: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Return median seconds of each after one warm-up, interleaved, so that slow periods affect all."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for contestant in contestants.values():
        contestant()
    for _ in range(repeats):
        for name, contestant in contestants.items():
            start = clock()
            contestant()
            times[name].append(clock() - start)
    return {name: median(values) for name, values in times.items()}


def measure(problem: Problem, kind: str, repeats: int, clock: Callable[[], float]) -> dict[str, float | str]:
    """Return seconds and ratios of one kind; the two forms must give the same loss."""
    bridge = problem.bridge(kind)
    fused, gather = problem.fused(bridge), problem.gather(bridge)
    if abs(fused - gather) > 1e-4 * max(abs(gather), 1e-3):
        raise ArithmeticError(f"{kind}: bridge_loss gives {fused}, the gather form {gather}")
    seconds = interleaved(
        {
            "floor": problem.floor(),
            "bridge_loss": lambda: problem.fused(bridge),
            "gather": lambda: problem.gather(bridge),
        },
        repeats,
        clock,
    )
    return {
        "kind": kind,
        **seconds,
        "of_floor": seconds["bridge_loss"] / seconds["floor"],
        "speedup": seconds["gather"] / seconds["bridge_loss"],
        "excess_speedup": (seconds["gather"] - seconds["floor"])
        / (seconds["bridge_loss"] - seconds["floor"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kinds", nargs="+", default=["gold", "uld", "forward", "reverse"])
    parser.add_argument("--groups", type=int, default=256)
    parser.add_argument("--vocab-s", type=int, default=130_000)
    parser.add_argument("--vocab-t", type=int, default=150_000)
    parser.add_argument("--d-student", type=int, default=512)
    parser.add_argument("--d-teacher", type=int, default=1024)
    parser.add_argument("--shared", type=float, default=0.65, help="of the smaller vocabulary")
    parser.add_argument("--chunk-rows", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    problem = Problem(arguments)
    rows = [measure(problem, kind, arguments.repeats, clock) for kind in arguments.kinds]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(title=f"{arguments.groups} groups, {arguments.vocab_s} / {arguments.vocab_t} ids")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else value for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
