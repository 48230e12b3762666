"""The bridges: losses between two vocabularies, and their approximations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

from mergeopd.loss.buffers import Workspace
from mergeopd.loss.cross_tokenizer.gold import RankScorer
from mergeopd.loss.cross_tokenizer.maps import ExactPairs, PieceTable, SparseMap
from mergeopd.loss.cross_tokenizer.pieces import PieceScorer
from mergeopd.loss.cross_tokenizer.projection import Direction, ProjectionScorer
from mergeopd.loss.cross_tokenizer.rows import MergeStrategy
from mergeopd.loss.divergence import JSD, ForwardKL


@dataclass(frozen=True, eq=False)
class Gold:
    """Compare shared tokens by identity and the others by rank (GOLD, TRL's hybrid ULD loss).

        weights[0] sum_pairs [beta q_T log(q_T / M) + (1 - beta) q_S log(q_S / M)]
            + weights[1] sum_i |sort(q_S without pairs)_i - sort(q_T without pairs)_i|

    with `M = beta q_T + (1 - beta) q_S`; both sides descending, the shorter padded with zeros. None as
    weights is GOLD's adaptive choice: the pairs' share of the teacher's vocabulary, and the rest. With the
    same vocabulary twice and one token per group this is `JSD(beta)`, exactly.

    q is a group's merged distribution, not normalised: one of its rows contributes its whole distribution,
    the others the probability of their label.

    observed  the first row's distribution is kept. q of the group's first token is the group's chain-rule
              probability; other tokens are weighted as if the same tokens had followed them
    bayesian  the last row's distribution is kept. q of the group's last token is the group's probability;
              the entries are exact probabilities of the strings that differ in the last token only

    Approximations: both ways of merging, for groups with two or more tokens on a side (merged masses then
    differ between models that agree), and the unshared tokens, which are matched by rank. Unlike TRL's,
    factors are not clamped to 1e-8, and the rows are those that predict the group's own tokens under both
    strategies.
    """

    pairs: ExactPairs
    beta: float = 0.5
    merge: MergeStrategy = "observed"
    weights: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        JSD(self.beta)
        _require_merge(self.merge)
        if self.weights is not None and not all(0.0 <= weight < float("inf") for weight in self.weights):
            raise ValueError(f"Gold: weights are {self.weights}, must be finite and not negative")

    @property
    def vocabularies(self) -> tuple[int, int]:
        """Sizes of the student's and the teacher's vocabulary."""
        return self.pairs.vocab_S, self.pairs.vocab_T

    def scorer(self, workspace: Workspace) -> RankScorer:
        share = self.pairs.ids_T.shape[0] / max(self.pairs.vocab_T, 1)
        weights = (share, 1.0 - share) if self.weights is None else self.weights
        return RankScorer(workspace, self.merge, self.pairs, JSD(self.beta), weights)


@dataclass(frozen=True, eq=False)
class Uld:
    """`sum_i |sort(q_S)_i - sort(q_T)_i|` over the whole vocabularies (ULD, 2402.12030), the shorter padded.

    The Wasserstein-1 distance of two distributions without regard to token identity. Independent of the order
    of either vocabulary, and 0 for different distributions with equal sorted probabilities. Groups are merged
    as in `Gold`, with the same approximations.
    """

    merge: MergeStrategy = "observed"

    def __post_init__(self) -> None:
        _require_merge(self.merge)

    vocabularies: ClassVar[None] = None  # fits any two

    def scorer(self, workspace: Workspace) -> RankScorer:
        return RankScorer(workspace, self.merge)


@dataclass(frozen=True, eq=False)
class Projected:
    """KL of the student's probabilities projected by W to the teacher's vocabulary (X-Token, 2605.21699).

    `a = exp(mean over the group's rows of log(p_S W))`, `b = exp(mean over its rows of log p_T)`, over the
    teacher ids C covered by W, or the `top_k` of them with the largest b:

        forward  sum_C [b log(b / a) - b + a]        reverse  sum_C [a log(a / b) - a + b]

    With W the identity and one token per group these are KL(p_T ‖ p_S) and KL(p_S ‖ p_T), exactly.

    Approximations: W distributes a student token over teacher tokens by fixed weights, independent of the
    text; the mean of a group's rows is a geometric mean of predictions for different tokens; mass outside C
    is ignored (`matched_T` of the statistics is the mass inside). Unlike in X-Token, sums over partial
    distributions get the terms `-b + a`, without which a KL can be negative and is not stationary where the
    models agree; and each group has its own `top_k`, where X-Token takes the best of the whole micro-batch,
    so that a group's value does not depend on the other groups. Where `p_S W` underflows (float32: below
    1e-38) its logarithm is clamped and has no gradient.
    """

    table: SparseMap
    direction: Direction = "forward"
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.direction not in get_args(Direction):
            raise ValueError(f'Projected: direction is {self.direction!r}, must be "forward" or "reverse"')
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"Projected: top_k is {self.top_k}, must be at least 1; None means all")
        if not self.table.covered.numel():
            raise ValueError("Projected: the map covers no teacher id, so nothing can be learned with it")

    @property
    def vocabularies(self) -> tuple[int, int]:
        return self.table.vocab_S, self.table.vocab_T

    def scorer(self, workspace: Workspace) -> ProjectionScorer:
        return ProjectionScorer(workspace, self.table, self.direction, self.top_k)


@dataclass(frozen=True, eq=False)
class Pieces:
    """Split the teacher's next token into student tokens, and compare with the student's next token.

        q_T(s) = sum of p_T(t) over the teacher's tokens t whose text the student begins with s

    on a group's first row, where both models have read the same text; the group's own probability, known
    exactly by the chain rule, is assigned to the token that the student generated. A longer token of the
    teacher that begins in an earlier group and covers the boundary is added with its probability divided by
    that of the tokenization at hand: a teacher whose vocabulary has `ab` as one token gives little
    probability to `b` after a single `a`, so without this the student would learn to omit the `b`. Inside a
    group of one teacher token, later rows are compared with the same row of the teacher, given the pieces so
    far; the group's token is split into the pieces that the student generated, canonical or not.

    A group's value is the mean over its rows of KL(q_T ‖ p_S), or of `JSD(beta)`; exactly so with the same
    vocabulary twice and one token per group. Reverse KL would be infinite: most student tokens begin no token
    of the teacher.

    No ranking, spreading or averaging: for a teacher with longer tokens than the student's this is the
    distribution of the student's next token, except for teacher tokens that end inside a student token.
    Those are used unchanged (the approximation), so a teacher with much shorter tokens would train the
    student to generate shorter ones. Groups of several tokens on both sides count with their first row.
    """

    table: PieceTable
    divergence: ForwardKL | JSD

    @property
    def vocabularies(self) -> tuple[int, int]:
        return self.table.vocab_S, self.table.ids.shape[0]

    def scorer(self, workspace: Workspace) -> PieceScorer:
        return PieceScorer(self.table, self.divergence)


Bridge = Gold | Uld | Projected | Pieces


def _require_merge(merge: MergeStrategy) -> None:
    if merge not in get_args(MergeStrategy):
        raise ValueError(f'merge is {merge!r}, must be "observed" or "bayesian"')
