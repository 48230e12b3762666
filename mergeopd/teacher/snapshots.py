"""Snapshots of the student's weights for self-teachers: periodic copies or moving averages.

They change only between rounds: a teacher's cached hidden states and its head must have the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from mergeopd.errors import StorageError
from mergeopd.recipe.models import SnapshotRule
from mergeopd.storage.state_parts import SavedTensors

# Returns a student's current weights by parameter name.
NamedWeights = Callable[[], Iterator[tuple[str, Tensor]]]


class Snapshot:
    """One set of weights updated from the student by a rule, shared by all teachers with that rule.

    `tensors` maps parameter names to weights, in the dtype of the student's forward pass for `every`, and in
    that of its master weights for `ema`, whose changes are smaller than bfloat16 resolves. `version` is
    incremented at every change, within a process.
    """

    def __init__(self, rule: SnapshotRule, weights: NamedWeights, masters: NamedWeights) -> None:
        self.rule = rule
        self.version = 0
        self.tensors = {name: t.detach().clone() for name, t in self._own(weights, masters)}

    @property
    def label(self) -> str:
        """Short name of the rule: `every-20`, `ema-0.95`."""
        return f"ema-{self.rule.ema!r}" if self.rule.every is None else f"every-{self.rule.every}"

    @torch.no_grad()
    def advance(self, weights: NamedWeights, masters: NamedWeights, before: int, after: int) -> None:
        """Apply the rule after a round that took the run from `before` to `after` updates."""
        every, ema = self.rule.every, self.rule.ema
        if every is not None and after // every == before // every:
            return
        for name, now in self._own(weights, masters):
            held = self.tensors[name]
            if ema is None:
                held.copy_(now)
            else:
                held.mul_(ema).add_(now, alpha=1.0 - ema)
        self.version += 1

    @torch.no_grad()
    def load(self, tensors: SavedTensors) -> None:
        for name, held in self.tensors.items():
            held.copy_(tensors.read(f"{self.label}/{name}"))
        self.version += 1

    def _own(self, weights: NamedWeights, masters: NamedWeights) -> Iterator[tuple[str, Tensor]]:
        return masters() if self.rule.every is None else weights()


class StudentSnapshots:
    """All snapshots of a run, one for each rule; most runs have none.

    `weights` and `masters` return the student's weights, with which all snapshots begin. They are collective,
    and called only where a rule needs them.
    """

    def __init__(self, rules: Iterable[SnapshotRule], weights: NamedWeights, masters: NamedWeights) -> None:
        self.snapshots = {rule: Snapshot(rule, weights, masters) for rule in dict.fromkeys(rules)}

    def advance(self, weights: NamedWeights, masters: NamedWeights, before: int, after: int) -> None:
        for snapshot in self.snapshots.values():
            snapshot.advance(weights, masters, before, after)

    def release(self) -> None:
        """Free all weights; self-teachers cannot be loaded afterwards."""
        for snapshot in self.snapshots.values():
            snapshot.tensors.clear()

    def state(self) -> dict[str, Tensor]:
        """Return all weights, equal on all ranks; not copies."""
        return {
            f"{snapshot.label}/{name}": tensor
            for snapshot in self.snapshots.values()
            for name, tensor in snapshot.tensors.items()
        }

    def load_state(self, tensors: SavedTensors) -> None:
        """Restore `state()`. Raises StorageError when it is of other rules or another student."""
        own, saved = self.state(), tensors.shapes
        odd = own.keys() ^ saved.keys() or {n for n, t in own.items() if t.shape != saved[n]}
        if odd:
            raise StorageError(
                "its snapshots of the student do not match the teachers of this recipe "
                f"({', '.join(sorted(odd)[:3])} on one side only or of another shape)"
            )
        for snapshot in self.snapshots.values():
            snapshot.load(tensors)
