"""One rank of `test_loss_tensor_parallel.py`: compares sharded and unsharded results, and writes the errors to a JSON file.

Communicator 0 and 1 also form a group of two; every rank computes the unsharded result itself, from the same seeds.
"""

import datetime
import json
import os
import sys
from dataclasses import fields
from importlib.util import find_spec

import bridge_cases
import torch
import torch.distributed as dist

from mergeopd.loss import (
    JSD,
    TVD,
    AlphaDivergence,
    ClippedForwardKL,
    ForwardKL,
    Head,
    Hidden,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    Support,
    TopK,
    fused_loss,
    observe,
)

VOCAB = 37
# Rows of each shard: true ones, then all. Uneven, and one that is nothing but padding.
LAYOUTS = {
    "2 even": [(19, 19), (18, 19)],
    "2 uneven": [(30, 30), (7, 9)],
    "2 padding only": [(37, 37), (0, 5)],
    "4 uneven": [(3, 3), (21, 21), (12, 12), (1, 4)],
    "4 padding only": [(16, 16), (16, 16), (5, 16), (0, 16)],
}
DIVERGENCES = {
    "forward": (ForwardKL(),),
    "reverse": (ReverseKL(),),
    "jsd": (JSD(0.3),),
    "pointwise": (
        TVD(),
        SkewForwardKL(0.1),
        SkewReverseKL(0.2),
        AlphaDivergence(0.7),
        ClippedForwardKL(0.05),
    ),
    "all": (ForwardKL(), JSD(0.8), ReverseKL()),
    "none": (),
}

EVERY = (*DIVERGENCES["all"], *DIVERGENCES["pointwise"])
KLS = (ForwardKL(), ReverseKL())
# More ids than some shards have, and than there are.
SUPPORTS = {
    "student tail": (Support(4, "student", "tail"), EVERY),
    "teacher tail": (Support(25, "teacher", "tail"), EVERY),
    "union tail": (Support(7, "union", "tail"), EVERY),
    "union generalised": (Support(7, "union", "generalised"), KLS),
    "all tail": (Support(40, "union", "tail"), EVERY),
    "known tail": (Support(6, "teacher", "tail"), EVERY),
    "known generalised": (Support(6, "teacher", "generalised"), KLS),
    "known student": (Support(6, "student", "tail"), EVERY),
}


TRITON_LAYOUTS = ("2 uneven", "2 padding only", "4 uneven") if find_spec("triton") else ()
os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, at the first use


def make(dtype, num_teachers):
    g = torch.Generator().manual_seed(7)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    options = {"softcap": 8.0, "scale": 1.3}
    student = randn(11, 6), Head(randn(VOCAB, 6), randn(VOCAB), **options)
    teachers = [
        Hidden(randn(11, 4 + k), Head(2 * randn(VOCAB, 4 + k), randn(VOCAB), **options))
        for k in range(num_teachers)
    ]
    return *student, teachers, torch.randint(VOCAB, (11,), generator=g)


def shard(head, layout, rank, fill=1e4):
    """Rows of this rank. Padding rows are so large that they would dominate any softmax."""
    start = sum(valid for valid, _ in layout[:rank])
    valid, rows = layout[rank]
    weight = torch.full((rows, head.weight.shape[1]), fill, dtype=head.weight.dtype)
    bias = torch.full((rows,), fill, dtype=head.weight.dtype)
    weight[:valid], bias[:valid] = head.weight[start : start + valid], head.bias[start : start + valid]
    return Head(weight, bias, head.scale, head.softcap, num_valid=valid, vocab_start=start)


def objective(stats, rows):
    total = (stats.divergence.clamp(max=3.0) ** 2).sum((0, 1)) * stats.logprob_S.exp()
    return total - 0.1 * stats.logprob_S * stats.entropy_S


def run(hidden, head, teachers, labels, divergences, group, support=None, kernel="torch"):
    leaves = [
        hidden.clone().requires_grad_(),
        head.weight.clone().requires_grad_(),
        head.bias.clone().requires_grad_(),
    ]
    own = Head(leaves[1], leaves[2], head.scale, head.softcap, head.num_valid, head.vocab_start)
    loss, stats = fused_loss(
        leaves[0],
        own,
        teachers,
        labels,
        objective,
        divergences=divergences,
        support=support,
        temperature=1.5,
        group=group,
        chunk_rows=4,
        kernel=kernel,
        top_ids=6,
        overlap_rows=torch.tensor([0, 1, 3, 8, 10]),
    )
    loss.backward()
    return loss.detach(), stats, [leaf.grad for leaf in leaves]


def at_ids(whole, ids):
    """A target at the student's ids, from one with all ids."""
    logprobs = torch.empty_like(whole.logprobs).scatter(1, whole.ids, whole.logprobs)
    others = logprobs.scatter(1, ids, -torch.inf)
    return TopK(ids, logprobs.gather(1, ids), whole.logprob, whole.entropy, others.logsumexp(1), of="student")


def worst(actual, wanted):
    """Largest difference, relative to the largest expected value."""
    if wanted.numel() == 0:
        return 0.0
    return ((actual - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()


def compare(layout, divergences, dtype, num_teachers, group, support=None, num_known=0, kernel="torch"):
    """Compare with one process and torch; on a support, `num_known` teachers give only their own top k."""
    rank = dist.get_rank(group)
    hidden, head, teachers, labels = make(dtype, num_teachers)
    known = [
        observe(t.hidden, t.head, labels, temperature=1.5, top_k=support.k) for t in teachers[:num_known]
    ]
    if support is not None and support.of == "student" and known:
        ids = run(hidden, head, (), labels, (), None)[1].top_ids[:, : support.k].long()
        known = [
            at_ids(observe(teachers[0].hidden, teachers[0].head, labels, temperature=1.5, top_k=VOCAB), ids)
        ]
    loss, stats, whole = run(
        hidden, head, [*known, *teachers[num_known:]], labels, divergences, None, support
    )
    parts = [Hidden(t.hidden, shard(t.head, layout, rank)) for t in teachers]
    own = shard(head, layout, rank)
    loss_tp, stats_tp, (d_hidden, d_weight, d_bias) = run(
        hidden, own, [*known, *parts[num_known:]], labels, divergences, group, support, kernel
    )
    dist.all_reduce(d_hidden, group=group)
    valid, span = layout[rank][0], slice(own.vocab_start, own.vocab_start + layout[rank][0])
    errors = {"loss": worst(loss_tp, loss), "dH": worst(d_hidden, whole[0])}
    errors |= {
        field.name: worst(getattr(stats_tp, field.name), getattr(stats, field.name))
        for field in fields(stats)
        if field.name not in ("top_ids", "overlap")
    }
    if stats.overlap is not None:
        errors |= {
            f"overlap {name}": worst(part.nan_to_num(-9.0), getattr(stats.overlap, name).nan_to_num(-9.0))
            for name, part in vars(stats_tp.overlap).items()
        }
    errors["top_ids"] = float((stats_tp.top_ids.sort(1).values != stats.top_ids.sort(1).values).sum())
    scale = whole[1].abs().max(), whole[2].abs().max()
    errors["dW"] = ((d_weight[:valid] - whole[1][span]).abs().sum() / scale[0]).item()
    errors["dbias"] = ((d_bias[:valid] - whole[2][span]).abs().sum() / scale[1]).item()
    errors["padding"] = d_weight[valid:].abs().sum().item() + d_bias[valid:].abs().sum().item()
    return errors


def refusals(group):
    """Errors of this rank where only one rank has the cause."""
    layout, rank = LAYOUTS["4 uneven"], dist.get_rank(group)
    hidden, head, teachers, labels = make(torch.float64, 2)
    parts = [Hidden(t.hidden, shard(t.head, layout, rank)) for t in teachers]
    own = shard(head, layout, rank)

    def message(parts, labels):
        try:
            run(hidden, own, parts, labels, DIVERGENCES["all"], group)
        except (ValueError, ArithmeticError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing raised"

    outside = labels.clone()
    outside[3] = VOCAB
    result = {"label": message(parts, outside)}
    if rank == 2:
        parts[1].head.weight[0, 0] = torch.nan
    result["nan"] = message(parts, labels)
    if rank == 1:
        parts[0] = Hidden(parts[0].hidden, Head(parts[0].head.weight[:-1], None, vocab_start=own.vocab_start))
    result["shards"] = message(parts, labels)
    return result


def main(rank, world, store, out):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    pair = dist.new_group([0, 1])
    errors, on_supports, in_triton = {}, {}, {}
    for layout_name, layout in LAYOUTS.items():
        if len(layout) == 2 and rank > 1:
            continue
        group = pair if len(layout) == 2 else dist.group.WORLD
        for name, divergences in DIVERGENCES.items():
            for dtype in (torch.float64, torch.float32):
                for num_teachers in (1, 2):
                    key = f"{layout_name}|{name}|{dtype}|{num_teachers}"
                    errors[key] = compare(layout, divergences, dtype, num_teachers, group)
        for name, (support, divergences) in SUPPORTS.items():
            for dtype in (torch.float64, torch.float32):
                num_known = 1 if name.startswith("known") else 0
                on_supports[f"{layout_name}|{name}|{dtype}"] = compare(
                    layout, divergences, dtype, 2, group, support, num_known
                )
        if layout_name in TRITON_LAYOUTS:
            in_triton[layout_name] = compare(
                layout, DIVERGENCES["all"], torch.float64, 2, group, kernel="triton"
            )
    report = {
        "triton": in_triton,
        "errors": errors,
        "supports": on_supports,
        "refusals": refusals(dist.group.WORLD),
        "bridges": bridge_cases.report(rank, pair),
    }
    with open(out, "w") as file:
        json.dump(report, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
