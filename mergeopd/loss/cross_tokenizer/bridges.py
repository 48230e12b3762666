"""The bridges: what each measures between two vocabularies, and what that approximates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from mergeopd.loss.buffers import Workspace
from mergeopd.loss.cross_tokenizer.gold import RankScorer
from mergeopd.loss.cross_tokenizer.maps import ExactPairs, PieceTable, SparseMap
from mergeopd.loss.cross_tokenizer.pieces import PieceScorer
from mergeopd.loss.cross_tokenizer.projection import Direction, ProjectionScorer
from mergeopd.loss.cross_tokenizer.rows import Merge, Scorer
from mergeopd.loss.divergence import JSD, ForwardKL
from mergeopd.loss.heads import Projection


@dataclass(frozen=True, eq=False)
class Gold:
    """Shared tokens by identity, the others by rank (GOLD, TRL's hybrid ULD loss).

        weights[0] sum_pairs [beta q_T log(q_T / M) + (1 - beta) q_S log(q_S / M)]
            + weights[1] sum_i |sort(q_S without pairs)_i - sort(q_T without pairs)_i|

    with `M = beta q_T + (1 - beta) q_S`; both sides descending, the shorter padded with zeros. None as
    weights is GOLD's adaptive choice: the pairs' share of the teacher's vocabulary, and the rest. With the
    same vocabulary twice and one token per group this is `JSD(beta)`, exactly.

    q is a group's merged distribution, never normalised: of its rows, one keeps its whole distribution, and
    the others enter with the probability of the token that stands there.

    observed  the first row is kept. q of the group's first token is the group's chain-rule probability; all
              others are weighed as if the same tokens had followed them
    bayesian  the last row is kept. q of the group's last token is the group's probability; the entries are
              exact probabilities of the strings that differ in the last token alone

    Approximate: both mergings, as soon as a group has two tokens on a side (merged masses then differ
    between the models though the models may agree), and the rest, where rank stands for identity. Unlike
    TRL's, factors are not kept above 1e-8, and the rows are those that predict the group's own tokens under
    both strategies.
    """

    pairs: ExactPairs
    beta: float = 0.5
    merge: Merge = "observed"
    weights: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        JSD(self.beta)
        _require_merge(self.merge)
        if self.weights is not None and not all(0.0 <= weight < float("inf") for weight in self.weights):
            raise ValueError(f"Gold: weights are {self.weights}, must be finite and not negative")

    @property
    def vocabularies(self) -> tuple[int, int]:
        """Sizes that it was made for, the student's and the teacher's."""
        return self.pairs.vocab_S, self.pairs.vocab_T

    def scorer(self, student: Projection, teacher: Projection, workspace: Workspace) -> Scorer:
        """It at work on two heads."""
        share = self.pairs.ids_T.shape[0] / max(self.pairs.vocab_T, 1)
        weights = (share, 1.0 - share) if self.weights is None else self.weights
        return RankScorer(student, teacher, workspace, self.merge, self.pairs, JSD(self.beta), weights)


@dataclass(frozen=True, eq=False)
class Uld:
    """`sum_i |sort(q_S)_i - sort(q_T)_i|` over the whole vocabularies (ULD, 2402.12030), the shorter padded.

    The Wasserstein-1 distance of two distributions whose labels are worth nothing: how certain the models are
    is compared, not of what. The same for any order of either vocabulary, and 0 for different distributions
    that sort alike. Groups are merged as in `Gold` (there also: what that approximates).
    """

    merge: Merge = "observed"

    def __post_init__(self) -> None:
        _require_merge(self.merge)

    @property
    def vocabularies(self) -> None:
        """It fits any two."""
        return

    def scorer(self, student: Projection, teacher: Projection, workspace: Workspace) -> Scorer:
        """It at work on two heads."""
        return RankScorer(student, teacher, workspace, self.merge)


@dataclass(frozen=True, eq=False)
class Projected:
    """KL in the teacher's vocabulary, where W carries the student's probabilities (X-Token P-KL, 2605.21699).

    `a = exp(mean over the group's rows of log(p_S W))`, `b = exp(mean over its rows of log p_T)`, over the
    teacher ids C that W leads to, or the `top_k` of them with the largest b:

        forward  sum_C [b log(b / a) - b + a]        reverse  sum_C [a log(a / b) - a + b]

    With W the identity and one token per group these are KL(p_T ‖ p_S) and KL(p_S ‖ p_T), exactly.

    Approximate: W spreads a student token over teacher tokens by fixed weights, whatever the text; the mean
    of a group's rows is a geometric mean of predictions for different tokens; mass outside C is not looked at
    (`matched_T` of the statistics tells how much is inside). Unlike X-Token's, sums that are not over whole
    distributions get the terms `-b + a`, without which a KL can be negative and is not stationary where the
    models agree; and each group has its own `top_k`, where X-Token takes the best of the whole micro-batch,
    so that a group's value does not depend on its company. Where `p_S W` underflows (float32: below 1e-38)
    its logarithm ends, and its gradient.
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
            raise ValueError(
                "Projected: the map leads to no teacher id at all; nothing can be learned over it"
            )

    @property
    def vocabularies(self) -> tuple[int, int]:
        """Sizes that it was made for, the student's and the teacher's."""
        return self.table.vocab_S, self.table.vocab_T

    def scorer(self, student: Projection, teacher: Projection, workspace: Workspace) -> Scorer:
        """It at work on two heads."""
        return ProjectionScorer(student, teacher, workspace, self.table, self.direction, self.top_k)


@dataclass(frozen=True, eq=False)
class Pieces:
    """The teacher's next token cut into the student's tokens, compared with the student's next token.

        q_T(s) = sum of p_T(t) over the teacher's tokens t whose text the student begins with s

    on a group's first row, where both models have read the same text; the group's own probability, known
    exactly by the chain rule, goes to the token that the student wrote. Where a longer token of the teacher,
    begun in an earlier group, would cover the boundary, it counts with its probability over that of the path
    as it stands: a teacher that would have written `ab` in one token says little about what follows an `a`
    alone, and would teach to leave the `b` out. Inside a group of one teacher token, later rows are compared
    with the same row of the teacher, given the pieces so far; the token at hand is taken in the
    pieces that the student wrote, canonical or not.

    A group's value is the mean over its rows of KL(q_T ‖ p_S), or of `JSD(beta)`. With the same vocabulary
    twice and one token per group it is exactly that. Reverse KL would be infinite: no token of the teacher
    begins with most of the student's.

    Nothing is ranked, spread or averaged: for a teacher with longer tokens than the student's it is the
    distribution of the student's next token, but for tokens of the teacher that end where the student's
    would go on. Those are taken as they stand (the approximation), so a teacher with much shorter tokens
    would teach to write shorter ones. Groups of several tokens on both sides count with their first row.
    """

    table: PieceTable
    divergence: ForwardKL | JSD

    @property
    def vocabularies(self) -> tuple[int, int]:
        """Sizes that it was made for, the student's and the teacher's."""
        return self.table.vocab_S, self.table.ids.shape[0]

    def scorer(self, student: Projection, teacher: Projection, workspace: Workspace) -> Scorer:
        """It at work on two heads."""
        return PieceScorer(student, teacher, workspace, self.table, self.divergence)


Bridge = Gold | Uld | Projected | Pieces


def _require_merge(merge: Merge) -> None:
    if merge not in get_args(Merge):
        raise ValueError(f'merge is {merge!r}, must be "observed" or "bayesian"')
