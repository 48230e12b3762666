"""What a recipe's bridge compares, as the kernel wants it."""

from __future__ import annotations

from pathlib import Path

import torch

from mergeopd.align.vocab import teacher_pieces
from mergeopd.loss.cross_tokenizer import (
    Bridge,
    ExactPairs,
    Gold,
    Pieces,
    PieceTable,
    Projected,
    SparseMap,
    Uld,
)
from mergeopd.loss.divergence import JSD, ForwardKL
from mergeopd.teacher.cross_tokenizer import CrossTokenizer


def measure(crossing: CrossTokenizer, cache: Path, device: torch.device) -> Bridge | None:
    """None for `span`, which compares no distributions. Raises what `CrossTokenizer.vocabulary_map` does."""
    written = crossing.bridge
    if written.span is not None:
        return None
    if written.uld is not None:
        return Uld(written.uld.merge)
    num_student, num_teacher = len(crossing.student.tokens), len(crossing.other.tokens)
    if written.pieces is not None:
        spelled = teacher_pieces(crossing.student, crossing.other.tokens, crossing.ends)
        beta = written.pieces.jsd
        pieces = PieceTable(torch.from_numpy(spelled).to(device), num_student)
        return Pieces(pieces, ForwardKL() if beta is None else JSD(beta))
    found = crossing.vocabulary_map(cache)
    if written.gold is not None:
        pairs = ExactPairs(
            torch.from_numpy(found.student_ids).to(device),
            torch.from_numpy(found.teacher_ids).to(device),
            num_student,
            num_teacher,
        )
        return Gold(pairs, written.gold.beta, written.gold.merge, written.gold.weights)
    assert written.projection is not None
    table = SparseMap(
        torch.from_numpy(found.projection_ids).to(device),
        torch.from_numpy(found.projection_weights).to(device),
        num_teacher,
    )
    return Projected(table, written.projection.direction, written.projection.top_k)
