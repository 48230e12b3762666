"""Losses between models with different tokenizers, from hidden states and aligned groups of tokens."""

from mergeopd.loss.cross_tokenizer.bridges import Bridge, Gold, Pieces, Projected, Uld
from mergeopd.loss.cross_tokenizer.fused import BridgeStats, bridge_loss
from mergeopd.loss.cross_tokenizer.groups import Groups, group_logratio
from mergeopd.loss.cross_tokenizer.maps import ExactPairs, PieceTable, SparseMap

__all__ = [
    "Bridge",
    "BridgeStats",
    "ExactPairs",
    "Gold",
    "Groups",
    "PieceTable",
    "Pieces",
    "Projected",
    "SparseMap",
    "Uld",
    "bridge_loss",
    "group_logratio",
]
