"""Exact divergences between language models, without a `[tokens, vocabulary]` matrix. Depends on torch alone.

`fused_loss` takes last hidden states and prediction heads of a student and of any number of teachers, and
returns a scalar to call `backward` on and statistics per token. `build_objective` sums divergences.

    objective = build_objective({"reverse_kl": (ReverseKL(), 1.0)})
    loss, stats = fused_loss(
        hidden,                                       # [N, d], requires grad
        Head(lm_head.weight),
        [Hidden(teacher_hidden, Head(teacher_lm_head.weight))],
        labels,                                       # [N]
        objective.mean_over(mask),                    # [N]
        divergences=objective.divergences,
    )

inputs       `Head` (weight, bias, scale, soft cap, padding rows); targets `Hidden` (exact), `TopK`, `Sampled`
divergences  `ReverseKL`, `ForwardKL`, `JSD`, `TVD`, `SkewForwardKL`, `SkewReverseKL`, `AlphaDivergence`,
             `ClippedForwardKL`, all of the type `Divergence`; `Support` restricts them to top-k token ids
objective    `build_objective` gives a `DistillationObjective`; an `Objective` is any function of `BlockStats`
results      `TokenStats`: divergences `[K, D, N]`, log-probabilities, entropies and the loss per token
others       `observe` computes what targets need without gradients; `Workspace` reuses buffers over calls

`examples/kl_in_your_trainer.py` compares the gradient with autograd on full logits.
"""

from mergeopd.loss.buffers import Workspace
from mergeopd.loss.divergence import JSD, Divergence, ForwardKL, ReverseKL
from mergeopd.loss.full_vocabulary import BlockStats
from mergeopd.loss.fused import Objective, TokenStats, fused_loss
from mergeopd.loss.heads import Head, Hidden
from mergeopd.loss.objective import DistillationObjective, build_objective
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
    "DistillationObjective",
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
    "build_objective",
    "fused_loss",
    "observe",
]
