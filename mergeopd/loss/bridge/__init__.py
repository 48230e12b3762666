"""Losses between models with different tokenizers, from hidden states and aligned groups of tokens."""

from mergeopd.loss.bridge.fused import BridgeStats, bridge_loss
from mergeopd.loss.bridge.groups import Groups, group_logratio
from mergeopd.loss.bridge.kinds import Bridge, Gold, Projected, Uld
from mergeopd.loss.bridge.maps import ExactPairs, SparseMap

__all__ = [
    "Bridge",
    "BridgeStats",
    "ExactPairs",
    "Gold",
    "Groups",
    "Projected",
    "SparseMap",
    "Uld",
    "bridge_loss",
    "group_logratio",
]
