"""Signals and gradient alignments of made-up inspections."""

from __future__ import annotations

import random
from itertools import pairwise

from mergeopd.reporting.inspection import GradientAlignment, Onset, PositionBucket, Rendering, Signal
from mergeopd.reporting.result import Estimate

UNKNOWN = Estimate(None)


def estimate(value: float | None, half_width: float = 0.03) -> Estimate:
    """Return an estimate with a symmetric interval."""
    return UNKNOWN if value is None else Estimate(value, value - half_width, value + half_width)


def fraction(value: float, half_width: float = 0.05) -> Estimate:
    """Return an estimate of a fraction, whose interval stays between 0 and 1."""
    return Estimate(value, max(0.0, value - half_width), min(1.0, value + half_width))


def signal(
    overlap: float,
    reverse_kl: float | None,
    passes: tuple[float, float],
    beyond: int | None = None,
    num_prompts: int = 64,
    renderings: tuple[Rendering, ...] = (),
) -> Signal:
    """Return a signal with the given overlap, divergence, and pass rates of student and teacher."""
    return Signal(
        num_prompts=num_prompts,
        num_responses=4 * num_prompts,
        num_tokens=410 * 4 * num_prompts,
        k=16,
        overlap=fraction(overlap, 0.02),
        overlap_advantage=estimate(-0.4 * (1 - overlap), 0.01),
        entropy_gap=estimate(0.5 * (1 - overlap) + 0.02, 0.015),
        entropy_S=estimate(0.62),
        entropy_T=estimate(0.41),
        shared_mass_S=fraction(0.90 + 0.09 * overlap, 0.004),
        shared_mass_T=fraction(0.88 + 0.11 * overlap, 0.005),
        reverse_kl=estimate(reverse_kl, 0.02),
        forward_kl=estimate(None if reverse_kl is None else 1.3 * reverse_kl, 0.03),
        logprob_gap=estimate(-0.8 * (1 - overlap), 0.02),
        pass_rate_S=fraction(passes[0]),
        pass_rate_T=fraction(passes[1]),
        teacher_logprob_gap=estimate(-1.1 * (1 - overlap), 0.03),
        num_frontier=round(num_prompts * min(passes[0], 1 - passes[0]) * 1.4),
        positions=positions(overlap, reverse_kl, beyond),
        first_token_kl=estimate(None if reverse_kl is None else 1.5 * reverse_kl, 0.05),
        own_entropy_T=estimate(0.38),
        pass_gain=estimate(passes[1] - passes[0], 0.06),
        max_entropy=11.93,
        foreign_ends=0.0,
        truncated_S=0.02,
        truncated_T=0.0,
        onset=None if beyond is None else Onset(beyond, 0.38, 1.4, 81_000, 21_500),
        renderings=renderings,
    )


def positions(overlap: float, reverse_kl: float | None, beyond: int | None) -> tuple[PositionBucket, ...]:
    """Return buckets that double from 16 to 4,096 tokens; a teacher is noisy `beyond` a token."""
    edges = [0, *(16 * 2**i for i in range(9))]
    buckets = []
    for i, (start, stop) in enumerate(pairwise(edges)):
        is_noisy = beyond is not None and start >= beyond
        wave = 0.05 * random.Random(i).uniform(-1, 1)
        divergence = (
            None if reverse_kl is None else reverse_kl * (3.0 if is_noisy else 1.25 - 0.06 * i + wave)
        )
        buckets.append(
            PositionBucket(
                start=start,
                stop=stop,
                num_tokens=(stop - start) * max(8, 256 >> (i // 2)),
                reverse_kl=divergence,
                overlap=overlap * (0.6 if is_noisy else 0.95 + 0.01 * i + wave / 5),
                entropy_S=0.75 - 0.03 * i + wave,
                entropy_T=1.4 if is_noisy else 0.5 - 0.02 * i + wave,
                own_entropy_T=1.4 if is_noisy else 0.38 + wave,
                advantage=-0.4 * (1 - overlap) * (2.5 if is_noisy else 1.0 + wave),
            )
        )
    return tuple(buckets)


def gradient_alignment() -> GradientAlignment:
    """Return cosines of gradients that agree more on incorrect responses, and less at depth."""
    return GradientAlignment(
        num_nodes=96,
        num_skipped=31,
        num_rollouts=6144,
        score=Estimate(0.34, 0.27, 0.41),
        on_correct=Estimate(0.08, -0.05, 0.21),
        on_incorrect=Estimate(0.47, 0.38, 0.56),
        positions=tuple(
            PositionBucket(
                start,
                stop,
                24,
                None,
                None,
                None,
                None,
                alignment=value,
                alignment_low=value - 0.1,
                alignment_high=value + 0.1,
            )
            for start, stop, value in ((0, 64, 0.41), (64, 256, 0.37), (256, 1024, 0.28), (1024, 4096, -0.06))
        ),
        by_domain={
            "math": Estimate(0.34, 0.27, 0.41),
            "algebra, second year": Estimate(-0.0594, -0.239, 0.0675),
        },
    )
