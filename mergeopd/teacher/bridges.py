"""Conversion of a recipe's bridge to the loss function's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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

    def tensor(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(device)

    if bridge.pieces is not None:
        spelled = teacher_pieces(crossing.student, crossing.other.tokens, crossing.ends)
        beta = bridge.pieces.jsd
        return Pieces(PieceTable(tensor(spelled), num_student), ForwardKL() if beta is None else JSD(beta))
    num_pieces = ProjectionBridge().pieces if bridge.projection is None else bridge.projection.pieces
    vocabulary = vocabulary_map(cache, crossing.student, crossing.other, crossing.ends, num_pieces)
    if bridge.gold is not None:
        ids = tensor(vocabulary.student_ids), tensor(vocabulary.teacher_ids)
        pairs = ExactPairs(*ids, num_student, num_teacher)
        return Gold(pairs, bridge.gold.beta, bridge.gold.merge, bridge.gold.weights)
    assert bridge.projection is not None
    weights = tensor(vocabulary.projection_weights)
    table = SparseMap(tensor(vocabulary.projection_ids), weights, num_teacher)
    return Projected(table, bridge.projection.direction, bridge.projection.top_k)
