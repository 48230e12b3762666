"""Losses between models with different tokenizers, from hidden states and aligned groups of tokens."""

from mergeopd.loss.bridge.fused import BridgeStats, bridge_loss
from mergeopd.loss.bridge.groups import Groups, group_logratio
from mergeopd.loss.bridge.kinds import Bridge, Gold, Pieces, Projected, Uld
from mergeopd.loss.bridge.maps import ExactPairs, PieceTable, SparseMap

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
