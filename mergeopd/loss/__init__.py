"""The kernel: exact divergences, full-vocabulary or top-k, in one pass. Depends on torch alone."""

from mergeopd.loss.buffers import Workspace
from mergeopd.loss.divergence import JSD, Divergence, ForwardKL, ReverseKL
from mergeopd.loss.full_vocabulary import BlockStats
from mergeopd.loss.fused import Objective, TokenStats, fused_loss
from mergeopd.loss.heads import Head, Hidden
from mergeopd.loss.observe import observe
from mergeopd.loss.pointwise import TVD, AlphaDivergence, ClippedForwardKL, SkewForwardKL, SkewReverseKL
from mergeopd.loss.support import Support
from mergeopd.loss.targets import Sampled, Target, TopK

__all__ = [
    "JSD",
    "TVD",
    "AlphaDivergence",
    "BlockStats",
    "ClippedForwardKL",
    "Divergence",
    "ForwardKL",
    "Head",
    "Hidden",
    "Objective",
    "ReverseKL",
    "Sampled",
    "SkewForwardKL",
    "SkewReverseKL",
    "Support",
    "Target",
    "TokenStats",
    "TopK",
    "Workspace",
    "fused_loss",
    "observe",
]
