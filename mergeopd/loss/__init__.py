"""The kernel: exact full-vocabulary divergences from hidden states, in one pass. Depends on torch alone."""

from mergeopd.loss.blocks import BlockStats
from mergeopd.loss.divergence import JSD, Divergence, ForwardKL, ReverseKL
from mergeopd.loss.fused import Objective, TokenStats, fused_loss
from mergeopd.loss.heads import Head, Hidden
from mergeopd.loss.pointwise import TVD, ClippedForwardKL, SkewForwardKL, SkewReverseKL
from mergeopd.loss.workspace import Workspace

__all__ = [
    "JSD",
    "TVD",
    "BlockStats",
    "ClippedForwardKL",
    "Divergence",
    "ForwardKL",
    "Head",
    "Hidden",
    "Objective",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "TokenStats",
    "Workspace",
    "fused_loss",
]
