"""Bridges on shards of both vocabularies, compared with one process by each rank from the same seeds."""

from __future__ import annotations

from dataclasses import replace

import bridge_reference as reference
import torch
import torch.distributed as dist
from torch import Tensor

from mergeopd.loss import JSD, ForwardKL, Head, Hidden
from mergeopd.loss.cross_tokenizer import (
    Bridge,
    Gold,
    Groups,
    Pieces,
    PieceTable,
    Projected,
    Uld,
    bridge_loss,
)

VOCAB_S, VOCAB_T = 19, 23
# True rows of each rank for the student and for the teacher; each shard has two rows of padding.
LAYOUTS = {
    "2 even": ([10, 9], [12, 11]),
    "2 uneven": ([3, 16], [20, 3]),
    "2 padding only": ([19, 0], [11, 12]),
    "4 uneven": ([2, 0, 9, 8], [0, 13, 9, 1]),
}
# Many groups of several sizes, in two runs; the last has one more row than a rank's share of a chunk.
SIZES_S = (1, 2, 1, 1, 3, 1, 2, 1, 1, 1, 2, 1, 4)
SIZES_T = (1, 1, 1, 3, 2, 1, 2, 1, 2, 1, 1, 1, 2)
STARTS = (0, 8)


def table_of_pieces() -> PieceTable:
    """Spellings of one to three pieces, some the beginning of others, and one token without text."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.full((VOCAB_T, 3), -1)
    for token in range(1, VOCAB_T):
        length = 1 + token % 3
        ids[token, :length] = torch.randint(6, (length,), generator=generator)
    return PieceTable(ids, VOCAB_S)


def bridges() -> dict[str, Bridge]:
    return {
        "gold": Gold(reference.pairs_of(12)),
        "gold bayesian": Gold(reference.pairs_of(7), beta=0.2, merge="bayesian"),
        "uld": Uld(),
        "projection": Projected(reference.table_of()),
        "projection best": Projected(reference.table_of(reach=9), "reverse", top_k=4),
        "pieces": Pieces(table_of_pieces(), ForwardKL()),
        "pieces jsd": Pieces(table_of_pieces(), JSD(0.3)),
    }


def problem_of(dtype: torch.dtype) -> reference.SimpleNamespace:
    problem = reference.make_problem(
        sizes_S=SIZES_S,
        sizes_T=SIZES_T,
        vocab_S=VOCAB_S,
        vocab_T=VOCAB_T,
        bias=True,
        scale=0.7,
        softcap=4.0,
        dtype=dtype,
    )
    g = problem.groups
    follows = torch.tensor([i not in STARTS for i in range(len(SIZES_S))])
    problem.groups = Groups(g.first_S, g.num_S, g.first_T, g.num_T, follows)
    # Few distinct pieces, so that longer tokens of the teacher cover the boundaries of groups.
    problem.labels_S = problem.labels_S % 6
    return problem


def shard(head: Head, widths: list[int], rank: int) -> Head:
    """This rank's rows. Padding rows are so large that they would dominate any softmax."""
    start, width = sum(widths[:rank]), widths[rank]
    weight = torch.full((width + 2, head.weight.shape[1]), 1e4, dtype=head.weight.dtype)
    bias = torch.full((width + 2,), 1e4, dtype=head.weight.dtype)
    weight[:width] = head.weight.detach()[start : start + width]
    bias[:width] = head.bias.detach()[start : start + width]
    return Head(weight, bias, head.scale, head.softcap, width, start)


def run(problem, head: Head, target: Hidden, bridge: Bridge, group) -> tuple[Tensor, object, list[Tensor]]:
    hidden = problem.hidden.detach().clone().requires_grad_()
    weight, bias = (t.detach().clone().requires_grad_() for t in (head.weight, head.bias))
    loss, stats = bridge_loss(
        hidden,
        replace(head, weight=weight, bias=bias),
        target,
        problem.groups,
        problem.labels_S,
        problem.labels_T,
        bridge,
        problem.weight_G,
        temperature=1.3,
        group=group,
        chunk_rows=6,
    )
    loss.backward()
    return loss.detach(), stats, [hidden.grad, weight.grad, bias.grad]


def compare(layout: str, name: str, dtype: torch.dtype, group) -> dict[str, float]:
    """The largest differences from one process, relative to the largest value."""
    widths_S, widths_T = LAYOUTS[layout]
    rank, problem, bridge = dist.get_rank(group), problem_of(dtype), bridges()[name]
    loss, stats, whole = run(problem, problem.head, problem.target, bridge, None)
    own = shard(problem.head, widths_S, rank)
    target = Hidden(problem.target.hidden, shard(problem.target.head, widths_T, rank))
    loss_tp, stats_tp, (d_hidden, d_weight, d_bias) = run(problem, own, target, bridge, group)
    dist.all_reduce(d_hidden, group=group)
    rows, width = slice(own.vocab_start, own.vocab.stop), widths_S[rank]
    pairs = {"loss": (loss_tp, loss), "dH": (d_hidden, whole[0])}
    pairs |= {key: (getattr(stats_tp, key), value) for key, value in vars(stats).items()}
    errors = {
        key: ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for key, (a, b) in pairs.items()
    }
    for key, actual, wanted in (("dW", d_weight, whole[1]), ("dbias", d_bias, whole[2])):
        errors[key] = ((actual[:width] - wanted[rows]).abs().sum() / wanted.abs().max()).item()
        errors[f"padding {key}"] = actual[width:].abs().sum().item()
    return errors


def refusals(group) -> dict[str, str]:
    """Errors of this rank where only one rank has the cause."""
    problem, (widths_S, widths_T) = problem_of(torch.float64), LAYOUTS["4 uneven"]
    rank, bridge = dist.get_rank(group), bridges()["gold"]
    own, hidden = shard(problem.head, widths_S, rank), problem.target.hidden
    target = Hidden(hidden, shard(problem.target.head, widths_T, rank))

    def message(target: Hidden) -> str:
        try:
            run(problem, own, target, bridge, group)
        except (ValueError, ArithmeticError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing raised"

    hole = replace(target.head, vocab_start=target.head.vocab_start + int(rank == 2))
    narrow = Hidden(hidden[:, : -1 if rank == 1 else None], target.head)
    result = {"hole": message(Hidden(hidden, hole)), "width": message(narrow)}
    if rank == 2:
        target.head.weight[0, 0] = torch.nan
    return result | {"nan": message(target)}


def report(rank: int, pair) -> dict[str, object]:
    errors = {
        f"{layout}|{name}|{dtype}": compare(
            layout, name, dtype, pair if layout[0] == "2" else dist.group.WORLD
        )
        for layout in LAYOUTS
        if layout[0] == "4" or rank < 2
        for name in bridges()
        for dtype in (torch.float64, torch.float32)
    }
    return {"errors": errors, "refusals": refusals(dist.group.WORLD)}
