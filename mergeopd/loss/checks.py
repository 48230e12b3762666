"""Input validation for the loss functions, and checks for NaN and infinity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mergeopd.loss.divergence import Divergence, ForwardKL, ReverseKL
from mergeopd.loss.heads import Head, Hidden
from mergeopd.loss.support import Support
from mergeopd.loss.targets import Sampled, Target, TopK

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Tolerance, in nats, for rounding in the sum of a teacher's probabilities.
_ROUNDING = 1e-2


def check_inputs(
    hidden_ND: Tensor,
    head: Head,
    targets: Sequence[Target],
    labels_N: Tensor,
    temperature: float,
    chunk_rows: int | None,
) -> None:
    """Raise ValueError for shapes, dtypes and numbers that do not fit."""
    if hidden_ND.dim() != 2:
        raise ValueError(
            f"hidden_ND must be [N, d], got {list(hidden_ND.shape)}; flatten batch and time first"
        )
    num = hidden_ND.shape[0]
    check_hidden("the student", hidden_ND, head, num)
    for k, target in enumerate(targets):
        if isinstance(target, Hidden):
            check_hidden(f"target {k}", target.hidden, target.head, num)
        elif target.logprob.shape != (num,):
            raise ValueError(f"target {k}: it has {target.logprob.shape[0]} tokens, the student {num}")
    check_labels("labels_N", labels_N, num)
    check_numbers(temperature, chunk_rows)


def check_vocabulary(
    labels_N: Tensor, head: Head, targets: Sequence[Target], group: dist.ProcessGroup | None
) -> tuple[range, Tensor]:
    """Return the range of all token ids over the group, and the number of shards with each label, `[N]`.

    Raises ValueError unless every head scores the student's ids; all ranks do. One small all-reduce.
    `require_labels` checks the numbers of shards, which waits for the device.
    """
    vocab, problem = head.vocab, None
    for k, target in enumerate(targets):
        if isinstance(target, Hidden) and target.head.vocab != vocab:
            problem = problem or (
                f"target {k} scores token ids [{target.head.vocab.start}, {target.head.vocab.stop}), "
                f"the student [{vocab.start}, {vocab.stop}); give each head its num_valid and vocab_start"
            )
    owners = ((labels_N >= vocab.start) & (labels_N < vocab.stop)).long()
    num_problems, vocab_size = int(problem is not None), len(vocab)
    if group is not None:
        owners = torch.cat([owners, owners.new_tensor([num_problems, vocab_size])])
        dist.all_reduce(owners, dist.ReduceOp.SUM, group=group)
        num_problems, vocab_size = owners[-2:].tolist()
        owners = owners[:-2]
    if num_problems:
        raise ValueError(problem or "on another rank of the group, student and target shards do not match")
    return vocab if group is None else range(vocab_size), owners


def require_labels(labels_N: Tensor, owners_N: Tensor, vocab: range, group: dist.ProcessGroup | None) -> None:
    """Raise ValueError unless every sampled id is a true token of exactly one shard."""
    if torch.any(owners_N != 1):
        token = int((owners_N != 1).nonzero()[0])
        where = f"the true vocabulary [{vocab.start}, {vocab.stop})" if group is None else "exactly one shard"
        raise ValueError(
            f"labels_N[{token}] = {int(labels_N[token])} is not in {where}; "
            "leave out padding and prompt tokens"
        )


def check_support(
    targets: Sequence[Target], divergences: Sequence[Divergence], support: Support | None, all_ids: range
) -> None:
    """Raise ValueError where a target does not hold what the divergences need."""
    if not divergences:
        return
    for divergence in divergences if support is not None and support.rest == "generalised" else ():
        if not isinstance(divergence, ForwardKL | ReverseKL):
            raise ValueError(
                f"{divergence} has no generalised form on a top-k support; "
                'use rest="tail", which works with every divergence'
            )
    for k, target in enumerate(targets):
        if isinstance(target, Sampled):
            raise ValueError(
                f"target {k}: no divergence can be computed from the sampled token's log-probability alone; "
                "give hidden states or the teacher's top k, or measure no divergences"
            )
        if isinstance(target, TopK):
            _check_top_k(f"target {k}", target, support, all_ids)


def require_finite(values: Tensor, rows: slice, what: str, of: str = "tokens") -> None:
    """Raise ArithmeticError naming `what` and the first of `rows` with NaN or infinity; `of` is the unit.

    Waits for the device.
    """
    bad = torch.isfinite(values).logical_not_()
    if bad.any():
        token = rows.start + int(bad.nonzero()[0])
        raise ArithmeticError(
            f"{what}: not finite at {int(bad.sum())} of the {of} {rows.start} to {rows.stop - 1}, "
            f"first at {token}"
        )


def check_labels(name: str, labels: Tensor, num: int) -> None:
    if labels.shape != (num,) or labels.dtype != torch.int64:
        raise ValueError(f"{name} must be int64 [{num}], got {labels.dtype} {list(labels.shape)}")


def check_numbers(temperature: float, chunk_rows: int | None) -> None:
    if not temperature > 0.0:
        raise ValueError(f"temperature is {temperature}, must be positive")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}, must be at least 1")


def check_hidden(name: str, hidden: Tensor, head: Head, num: int) -> None:
    expected = (num, head.weight.shape[1])
    if hidden.shape != expected:
        raise ValueError(f"{name}: hidden states are {list(hidden.shape)}, its head needs {list(expected)}")
    if hidden.dtype not in _DTYPES:
        raise ValueError(f"{name}: hidden states are {hidden.dtype}, must be float64, 32, 16 or bfloat16")


def _check_top_k(name: str, target: TopK, support: Support | None, all_ids: range) -> None:
    if support is None or support.of != target.of:
        requested = "the whole vocabulary" if support is None else f'a support of="{support.of}"'
        known = f"its top {target.k}" if target.of == "teacher" else f"the student's top {target.k}"
        raise ValueError(
            f"{name}: divergences over {requested} need its hidden states, but only {known} are "
            f'known; use Support(k={target.k}, of="{target.of}", rest=...), or give hidden states'
        )
    if target.k != min(support.k, len(all_ids)):
        raise ValueError(
            f"{name}: it has its top {target.k}, the support is the top {support.k}; "
            f"use Support(k={target.k}, ...), or have the teacher give {min(support.k, len(all_ids))}"
        )
    ids = target.ids.sort(1).values
    if ids.numel() and not all_ids.start <= int(ids.min()) <= int(ids.max()) < all_ids.stop:
        raise ValueError(
            f"{name}: its ids reach from {int(ids.min())} to {int(ids.max())}, "
            f"the true vocabulary is [{all_ids.start}, {all_ids.stop})"
        )
    repeated = (ids[:, 1:] == ids[:, :-1]).any(1)
    if repeated.any():
        raise ValueError(f"{name}: the top k of token {int(repeated.nonzero()[0])} contain an id twice")
    excess = torch.cat([target.logprobs, target.log_tail.unsqueeze(1)], 1).logsumexp(1) > _ROUNDING
    if excess.any():
        raise ValueError(
            f"{name}: its top k have a total probability above 1 at token {int(excess.nonzero()[0])}; "
            "logprobs must be log-probabilities, not logits"
        )
