"""The student's earlier weights, for teachers that follow it: copied every so often, or averaged.

They change between rounds only: a teacher's cached hidden states and its head must be of the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from mergeopd.errors import StorageError
from mergeopd.recipe.models import SnapshotRule

# A student's weights as they are when it is called, by parameter name.
NamedWeights = Callable[[], Iterator[tuple[str, Tensor]]]


class Snapshot:
    """One set of weights that follows the student by a rule, shared by all teachers with that rule.

    `tensors` are by parameter name: for `every` in the precision of the student's forward pass, for `ema` in
    that of its master weights, since an average moves by less than bfloat16 resolves. `version` changes with
    them, within a process.
    """

    def __init__(self, rule: SnapshotRule, weights: NamedWeights, masters: NamedWeights) -> None:
        self.rule = rule
        self.version = 0
        self.tensors = {name: t.detach().clone() for name, t in self._own(weights, masters)}

    @property
    def label(self) -> str:
        """The rule in a word: `every-20`, `ema-0.95`."""
        return f"ema-{self.rule.ema!r}" if self.rule.every is None else f"every-{self.rule.every}"

    @torch.no_grad()
    def advance(self, weights: NamedWeights, masters: NamedWeights, before: int, after: int) -> None:
        """A round is over, in which the run went from `before` to `after` updates."""
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
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the weights of a checkpoint."""
        for name, held in self.tensors.items():
            held.copy_(tensors[name])
        self.version += 1

    def _own(self, weights: NamedWeights, masters: NamedWeights) -> Iterator[tuple[str, Tensor]]:
        return masters() if self.rule.every is None else weights()


class StudentSnapshots:
    """All weights of a run that follow the student, one copy for each rule; most runs have none.

    `weights` and `masters` are the student's; what they give at the start of the run is where all begin. They
    are called where a rule needs them, on every process alike.
    """

    def __init__(self, rules: Iterable[SnapshotRule], weights: NamedWeights, masters: NamedWeights) -> None:
        self.snapshots = {rule: Snapshot(rule, weights, masters) for rule in dict.fromkeys(rules)}

    def advance(self, weights: NamedWeights, masters: NamedWeights, before: int, after: int) -> None:
        """A round is over, in which the run went from `before` to `after` updates."""
        for snapshot in self.snapshots.values():
            snapshot.advance(weights, masters, before, after)

    def release(self) -> None:
        """Free all weights; teachers that follow the student cannot be loaded afterwards."""
        for snapshot in self.snapshots.values():
            snapshot.tensors.clear()

    def state(self) -> dict[str, Tensor]:
        """All weights, flat, for a checkpoint."""
        return {
            f"{snapshot.label}/{name}": tensor
            for snapshot in self.snapshots.values()
            for name, tensor in snapshot.tensors.items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `state()`. Raises StorageError when it is of other rules or another student."""
        own = self.state()
        odd = own.keys() ^ tensors.keys() or {n for n, t in own.items() if t.shape != tensors[n].shape}
        if odd:
            raise StorageError(
                "its weights of teachers that follow the student are not those that this recipe has "
                f"({', '.join(sorted(odd)[:3])} on one side only or of another shape)"
            )
        for snapshot in self.snapshots.values():
            snapshot.load({name: tensors[f"{snapshot.label}/{name}"] for name in snapshot.tensors})
