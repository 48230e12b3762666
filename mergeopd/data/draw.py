"""Draw prompts in order: an infinite stream whose state is one integer.

Sources are interleaved by their shares as evenly as integers allow; within a source every prompt occurs once
per epoch, in an order keyed by seed, source and epoch.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm
from types import MappingProxyType

from mergeopd.errors import DataError
from mergeopd.types import Prompt

_EPOCHS_APART = 1 << 20


class PromptDraw:
    """The stream of prompts. The result of `draw` depends only on its arguments and the constructor's.

    After n positions a source of share s (of a total of 1) has been drawn between sn - 1 and sn + 1 times,
    for every n (R. Tijdeman, "The chairman assignment problem", Discrete Math. 32, 1980).
    """

    def __init__(
        self, sources: Mapping[str, Sequence[Prompt]], shares: Mapping[str, float], seed: int
    ) -> None:
        """Raises DataError if a source has no prompts or no positive share."""
        if not sources or sources.keys() != shares.keys():
            raise DataError(f"shares for {sorted(shares)} do not fit the sources {sorted(sources)}")
        # Sorted: the order in which sources are written is not part of the stream.
        self._sources = {name: tuple(sources[name]) for name in sorted(sources)}
        for name, prompts in self._sources.items():
            if not prompts:
                raise DataError(f"source {name!r} has no prompts")
            if not 0.0 < shares[name] < float("inf"):
                raise DataError(f"source {name!r} has the share {shares[name]}; it must be above 0")
        self._weights = _integer_weights({name: shares[name] for name in self._sources})
        self._period = sum(self._weights.values())
        self._seed = seed
        self._orders: dict[str, tuple[int, list[int]]] = {}
        self._reached = (0, dict.fromkeys(self._weights, 0))

    def draw(
        self, start: int, count: int, elsewhere: Mapping[str, int] = MappingProxyType({})
    ) -> list[tuple[int, Prompt]]:
        """Return positions `start` to `start + count` (exclusive) of the stream, as `(epoch, prompt)`.

        `epoch` is the number of earlier occurrences of the prompt; it keys the random numbers of its samples.
        `elsewhere` counts the prompts that other streams have drawn from each source before.
        """
        counts = self.counts(start)
        drawn = []
        for position in range(start, start + count):
            name = self._choose(position, counts)
            epoch, place = divmod(counts[name] + elsewhere.get(name, 0), len(self._sources[name]))
            drawn.append((epoch, self._sources[name][self._order(name, epoch)[place]]))
            counts[name] += 1
        self._reached = (start + count, counts)
        return drawn

    @property
    def proportions(self) -> tuple[tuple[str, int], ...]:
        """The shares in coprime integers, by source."""
        return tuple(self._weights.items())

    def counts(self, position: int) -> dict[str, int]:
        """Return how often each source was drawn before `position`."""
        reached, counts = self._reached
        if reached != position:
            # After every whole period all counts are exact, so at most one period is walked.
            periods, rest = divmod(position, self._period)
            if reached // self._period == periods and reached < position:
                walked, counts = reached, dict(counts)
            else:
                walked, counts = periods * self._period, {n: periods * w for n, w in self._weights.items()}
            for earlier in range(walked, periods * self._period + rest):
                counts[self._choose(earlier, counts)] += 1
        return dict(counts)

    def _choose(self, position: int, counts: Mapping[str, int]) -> str:
        """Apply Tijdeman's rule: of the sources that are due, choose the one with the earliest deadline.

        In units of 1 / (total x (2k - 2)) all values are integers, so that there is no rounding.
        """
        if len(self._weights) == 1:
            return next(iter(self._weights))
        slack, total = 2 * len(self._weights) - 2, self._period
        best: str | None = None
        best_gap = best_weight = 0
        for name, weight in self._weights.items():
            lag = (weight * (position + 1) - counts[name] * total) * slack
            if lag < total:
                continue
            gap = total * (slack - 1) - lag
            if best is None or gap * best_weight < best_gap * weight:
                best, best_gap, best_weight = name, gap, weight
        assert best is not None, "the lags of k sources sum to the total, so one is at least total / k"
        return best

    def _order(self, name: str, epoch: int) -> list[int]:
        """Return the source's permutation in this epoch, by hash to be independent of library versions."""
        if name not in self._orders or self._orders[name][0] != epoch:
            root = hashlib.blake2b(f"{self._seed}\0{epoch}\0{name}\0".encode(), digest_size=16)
            keys = []
            for prompt in self._sources[name]:
                digest = root.copy()
                digest.update(prompt.key.encode())
                keys.append(digest.digest())
            self._orders[name] = (epoch, sorted(range(len(keys)), key=keys.__getitem__))
        return self._orders[name][1]


@dataclass(frozen=True, slots=True)
class PhaseShares:
    """The sources that a phase draws from, with their shares, and the number of prompts that it draws.

    A phase that `selects` its prompts has a stream of its own, once `PhasedDraw.narrow` knows them.
    """

    shares: Mapping[str, float]
    num_prompts: int
    selects: bool = False


class PhasedDraw:
    """The prompts of a run's phases; as in `PromptDraw`, `draw` depends on arguments alone.

    Phases whose shares have the same proportions continue one stream. Streams with a source in common do not
    repeat each other: a later phase continues the order of a source where an earlier one stopped.
    """

    def __init__(
        self, sources: Mapping[str, Sequence[Prompt]], phases: Mapping[str, PhaseShares], seed: int
    ) -> None:
        """`phases` are in the order of the run. Raises DataError as `PromptDraw` does."""
        streams: dict[tuple[tuple[str, int], ...], PromptDraw] = {}
        positions: Counter[PromptDraw] = Counter()
        self._starts: dict[str, tuple[PromptDraw, Mapping[PromptDraw, int]]] = {}
        self._epochs: dict[str, int] = {}
        self._phases, self._seed = dict(phases), seed
        for name, phase in phases.items():
            if phase.selects:
                continue
            new = PromptDraw({source: sources[source] for source in phase.shares}, phase.shares, seed)
            stream = streams.setdefault(new.proportions, new)
            self._starts[name] = stream, dict(positions)
            positions[stream] += phase.num_prompts

    def narrow(self, phase: str, prompts: Mapping[str, Sequence[Prompt]]) -> None:
        """Draw a phase that selects its prompts from these of its sources.

        Its epochs are far from those of all other phases, so that no two rollouts of a prompt have the same
        random numbers. Raises DataError if a source has no prompts.
        """
        own = PromptDraw(prompts, self._phases[phase].shares, self._seed)
        apart = (list(self._phases).index(phase) + 1) * _EPOCHS_APART
        self._starts[phase] = own, {}
        self._epochs[phase] = apart

    def draw(self, phase: str, start: int, count: int) -> list[tuple[int, Prompt]]:
        """Return the prompts `start` to `start + count` (exclusive) of a phase, as `PromptDraw.draw` does."""
        stream, positions = self._starts[phase]
        elsewhere: Counter[str] = Counter()
        for other, position in positions.items():
            if other is not stream:
                elsewhere.update(other.counts(position))
        drawn = stream.draw(positions.get(stream, 0) + start, count, elsewhere)
        apart = self._epochs.get(phase, 0)
        return [(epoch + apart, prompt) for epoch, prompt in drawn]


def _integer_weights(shares: Mapping[str, float]) -> dict[str, int]:
    """Return coprime integers in the same proportions; 0.1 is exactly one tenth."""
    fractions = {name: Fraction(repr(float(share))) for name, share in shares.items()}
    scale = lcm(*(f.denominator for f in fractions.values()))
    weights = {name: int(f * scale) for name, f in fractions.items()}
    divisor = gcd(*weights.values())
    return {name: weight // divisor for name, weight in weights.items()}
