"""The direction in which a distillation loss moves the student's logits, token by token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mergeopd.loss.buffers import Workspace
from mergeopd.loss.checks import check_inputs, check_support, check_vocabulary, require_finite
from mergeopd.loss.full_vocabulary import BlockScorer
from mergeopd.loss.heads import Hidden, Projection
from mergeopd.loss.objective import DistillationObjective
from mergeopd.loss.slicing import compute_dtype, rows_in_chunk, slices
from mergeopd.loss.softmax import Softmaxes
from mergeopd.loss.top_k import SupportScorer


@torch.no_grad()
def descent_directions(
    student: Hidden, teacher: Hidden, objective: DistillationObjective, *, chunk_rows: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield `(rows, [n, V])`: minus the gradient of the objective's divergences in the student's logits.

    Logits are those of a forward pass, after scale and soft cap, and every row of the gradient sums to 0. The
    next chunk reuses the memory. Coefficients, temperature and support are the objective's; its other terms
    are left out.

    Raises ValueError for an objective without divergences, and for shapes or vocabularies that do not fit;
    ArithmeticError for NaN or infinity.
    """
    if not objective.divergences:
        raise ValueError("the objective has no divergence")
    head, num = student.head, len(student.hidden)
    labels_N = torch.full((num,), head.vocab.start, device=student.hidden.device)
    if chunk_rows is None:
        chunk_rows = rows_in_chunk(student.hidden.device, len(head.vocab), compute_dtype(student.hidden))
    check_inputs(student.hidden, head, [teacher], labels_N, objective.temperature, chunk_rows)
    all_ids, _ = check_vocabulary(labels_N, head, [teacher], None)
    check_support([teacher], objective.divergences, objective.support, all_ids)
    workspace, dtype = Workspace(), compute_dtype(student.hidden)
    own, other = (
        Projection(name, side.head, side.hidden, objective.temperature, dtype, workspace)
        for name, side in (("student", student), ("teacher", teacher))
    )
    softmaxes = Softmaxes(own, [other], head.vocab, None, labels_N)
    scorer: BlockScorer | SupportScorer = BlockScorer(softmaxes, objective.divergences)
    if objective.support is not None:
        scorer = SupportScorer(softmaxes, [teacher], objective.divergences, objective.support, all_ids)
    coefficients = torch.tensor(objective.coefficients, dtype=dtype, device=student.hidden.device)
    for rows in slices(0, num, chunk_rows):
        size = rows.stop - rows.start
        logits = own.raw_logits(rows)
        scored = scorer.score([logits, other.raw_logits(rows)], rows, with_grad=True)
        weights = (objective.temperature**2 * coefficients)[None, :, None].expand(1, -1, size)
        scored.logit_gradient(weights, logits.new_zeros(size), out=logits)
        if own.is_capped:
            logits.div_(own.take("slope", size))
        direction = logits.div_(-head.scale)
        require_finite(direction.sum(1), rows, "the gradient in the logits")
        yield rows, direction
