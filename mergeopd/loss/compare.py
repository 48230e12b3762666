"""Comparison of two models' next-token distributions, from hidden states and prediction heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from mergeopd.loss.buffers import Workspace
from mergeopd.loss.checks import check_inputs, check_vocabulary, require_finite, require_labels
from mergeopd.loss.heads import Hidden, Projection
from mergeopd.loss.overlap import on_common
from mergeopd.loss.slicing import compute_dtype, rows_in_chunk, slices
from mergeopd.loss.support import top_columns

T = TypeVar("T", "Comparison", "TwoTeachers")


@dataclass(frozen=True, eq=False)
class Comparison:
    """A student S and a teacher T at N tokens, in nats; every tensor is `[N]` but the candidates' `[N, c]`.

    reverse_kl, forward_kl  KL(S || T) and KL(T || S) over the whole vocabulary
    entropy_S, entropy_T    of the whole distributions
    logprob_S, logprob_T    log-probability of the sampled token
    overlap, advantage, mass_S, mass_T     on the common tokens, as `mergeopd.loss.overlap` defines them
    ids_S, logprobs_S, ids_T, logprobs_T   the c likeliest tokens of each, the likeliest first
    """

    reverse_kl: Tensor
    forward_kl: Tensor
    entropy_S: Tensor
    entropy_T: Tensor
    logprob_S: Tensor
    logprob_T: Tensor
    overlap: Tensor
    advantage: Tensor
    mass_S: Tensor
    mass_T: Tensor
    ids_S: Tensor
    logprobs_S: Tensor
    ids_T: Tensor
    logprobs_T: Tensor


@dataclass(frozen=True, eq=False)
class TwoTeachers:
    """Two teachers of the same N tokens, in nats.

    cosine  of the logit gradients of their reverse KLs; NaN where one of them is zero
    floor   `-W log Z`: the least value of the weighted sum of both reverse KLs (W is the sum of the weights)
    """

    cosine: Tensor
    floor: Tensor


def compare(
    student: Hidden,
    teacher: Hidden,
    labels_N: Tensor,
    *,
    k: int = 16,
    num_candidates: int = 0,
    chunk_rows: int | None = None,
) -> Comparison:
    """Compare the distributions of a student and a teacher at N tokens, exactly; no gradient.

    `labels_N` are the sampled token ids. k and `num_candidates` are at most the vocabulary. `chunk_rows`
    tokens are compared at once, in about `10 * chunk_rows * V` elements of memory.

    Raises ValueError for shapes, vocabularies or labels that do not fit, ArithmeticError for NaN or infinity.
    """

    def both(logprobs: Sequence[Tensor], rows: slice) -> Comparison:
        of_student, of_teacher = logprobs
        return compare_logprobs(of_student, of_teacher, labels_N[rows], k=k, num_candidates=num_candidates)

    parts = _chunks((student, teacher), labels_N, chunk_rows, both)
    return _joined(list(parts))


def compare_teachers(
    student: Hidden,
    first: Hidden,
    second: Hidden,
    labels_N: Tensor,
    weights: Sequence[Tensor],
    *,
    chunk_rows: int | None = None,
) -> TwoTeachers:
    """Compare what two teachers of the same tokens want of the student; no gradient.

    `weights` are the teachers' weights at each token, `[N]` each. Raises as `compare` does.
    """

    def both(logprobs: Sequence[Tensor], rows: slice) -> TwoTeachers:
        logprob_S, *teachers = logprobs
        gradients = [_gradient(logprob_S, each) for each in teachers]
        norms = [gradient.norm(dim=1) for gradient in gradients]
        cosine = torch.linalg.vecdot(*gradients) / (norms[0] * norms[1])
        own = [weight.to(logprob_S)[rows].unsqueeze(1) for weight in weights]
        total = own[0] + own[1]
        mean = (own[0] * teachers[0] + own[1] * teachers[1]) / total
        return TwoTeachers(cosine, -(total.squeeze(1) * mean.logsumexp(1)).clamp_max(0.0))

    chunks = _chunks((student, first, second), labels_N, chunk_rows, both)
    return _joined(list(chunks))


@torch.no_grad()
def compare_logprobs(
    logprobs_S: Tensor, logprobs_T: Tensor, labels_n: Tensor, *, k: int = 16, num_candidates: int = 0
) -> Comparison:
    """Compare two distributions given by all their log-probabilities, `[n, V]` each; see `compare`."""
    width = logprobs_S.shape[1]
    k, num_candidates = min(k, width), min(num_candidates, width)
    probs_S, probs_T = logprobs_S.exp(), logprobs_T.exp()
    difference = logprobs_S - logprobs_T
    top_S, top_T = top_columns(logprobs_S, k), top_columns(logprobs_T, k)
    is_top_T = torch.zeros_like(logprobs_T, dtype=torch.bool).scatter_(1, top_T, True)
    is_common = is_top_T.gather(1, top_S)
    overlap, advantage, mass_S, mass_T = on_common(
        logprobs_S.gather(1, top_S), logprobs_T.gather(1, top_S), is_common
    )
    best_S, best_T = (logprobs.topk(num_candidates, dim=1) for logprobs in (logprobs_S, logprobs_T))
    labels_n1 = labels_n.unsqueeze(1)
    return Comparison(
        reverse_kl=torch.linalg.vecdot(probs_S, difference),
        forward_kl=-torch.linalg.vecdot(probs_T, difference),
        entropy_S=-torch.linalg.vecdot(probs_S, logprobs_S),
        entropy_T=-torch.linalg.vecdot(probs_T, logprobs_T),
        logprob_S=logprobs_S.gather(1, labels_n1).squeeze(1),
        logprob_T=logprobs_T.gather(1, labels_n1).squeeze(1),
        overlap=overlap,
        advantage=advantage,
        mass_S=mass_S,
        mass_T=mass_T,
        ids_S=best_S.indices,
        logprobs_S=best_S.values,
        ids_T=best_T.indices,
        logprobs_T=best_T.values,
    )


@torch.no_grad()
def _chunks(
    models: Sequence[Hidden],
    labels_N: Tensor,
    chunk_rows: int | None,
    reduce: Callable[[Sequence[Tensor], slice], T],
) -> Iterator[T]:
    """Yield what `reduce` makes of all log-probabilities `[n, V]` of the models at some rows."""
    student, *others = models
    head = student.head
    dtype = compute_dtype(student.hidden)
    if chunk_rows is None:
        chunk_rows = rows_in_chunk(student.hidden.device, len(head.vocab), dtype)
    check_inputs(student.hidden, head, others, labels_N, 1.0, chunk_rows)
    require_labels(labels_N, check_vocabulary(labels_N, head, others, None)[1], head.vocab, None)
    workspace = Workspace()
    projections = [
        Projection(f"compared {i}", model.head, model.hidden, 1.0, dtype, workspace)
        for i, model in enumerate(models)
    ]
    # An empty chunk gives the results their shapes.
    for rows in slices(0, max(len(labels_N), 1), chunk_rows):
        logprobs = []
        for projection in projections:
            logits = projection.raw_logits(rows)
            projection.finish_logits(logits)
            require_finite(logits.sum(1), rows, "the logits")
            logprobs.append(logits.log_softmax(1))
        yield reduce(logprobs, rows)


def _joined(parts: Sequence[T]) -> T:
    """Concatenate records of tensors."""
    return type(parts[0])(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(parts[0])))


def _gradient(logprobs_S: Tensor, logprobs_T: Tensor) -> Tensor:
    """Return the gradient of KL(S || T) in the student's logits, `[n, V]`."""
    probs, ratios = logprobs_S.exp(), logprobs_S - logprobs_T
    gradient: Tensor = probs * (ratios - torch.linalg.vecdot(probs, ratios).unsqueeze(1))
    return gradient
