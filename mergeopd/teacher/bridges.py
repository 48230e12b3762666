"""Conversion of a recipe's bridge to the loss function's."""

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
from mergeopd.recipe.bridges import ProjectionBridge
from mergeopd.teacher.cross_tokenizer import CrossTokenizer, vocabulary_map


def measure(crossing: CrossTokenizer, cache: Path, device: torch.device) -> Bridge | None:
    """Build the loss of a bridge; None for `span`, which compares no distributions.

    Raises the errors of `vocabulary_map`.
    """
    bridge = crossing.bridge
    if bridge.span is not None:
        return None
    if bridge.uld is not None:
        return Uld(bridge.uld.merge)
    num_student, num_teacher = len(crossing.student.tokens), len(crossing.other.tokens)
    if bridge.pieces is not None:
        spelled = teacher_pieces(crossing.student, crossing.other.tokens, crossing.ends)
        beta = bridge.pieces.jsd
        pieces = PieceTable(torch.from_numpy(spelled).to(device), num_student)
        return Pieces(pieces, ForwardKL() if beta is None else JSD(beta))
    num_pieces = ProjectionBridge().pieces if bridge.projection is None else bridge.projection.pieces
    vocabulary = vocabulary_map(cache, crossing.student, crossing.other, crossing.ends, num_pieces)
    if bridge.gold is not None:
        pairs = ExactPairs(
            torch.from_numpy(vocabulary.student_ids).to(device),
            torch.from_numpy(vocabulary.teacher_ids).to(device),
            num_student,
            num_teacher,
        )
        return Gold(pairs, bridge.gold.beta, bridge.gold.merge, bridge.gold.weights)
    assert bridge.projection is not None
    table = SparseMap(
        torch.from_numpy(vocabulary.projection_ids).to(device),
        torch.from_numpy(vocabulary.projection_weights).to(device),
        num_teacher,
    )
    return Projected(table, bridge.projection.direction, bridge.projection.top_k)
