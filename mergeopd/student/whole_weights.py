"""The weights of a torch student in one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from mergeopd.errors import NumericsError
from mergeopd.loss.heads import Head
from mergeopd.models.causal import (
    DTYPES,
    assembled,
    build_skeleton,
    check_fit,
    fill,
    head_of,
    parameter_parts,
)
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.experts import published
from mergeopd.models.facts import ModelFacts
from mergeopd.storage.state_parts import StatePart
from mergeopd.student.layer_options import PassOptions, set_layer_options
from mergeopd.student.protocol import UNSHARDED, Placement


class Weights(Protocol):
    """A model's parameters, of which a process may have a shard, and what the optimizer updates.

    `masters` are this process's parts of the optimizer's weights, by parameter name; their `grad` is summed
    over all processes after `training`. `shapes` are those of the whole parameters. Methods are collective,
    except properties.
    """

    facts: ModelFacts
    body: nn.Module
    masters: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]

    @property
    def placement(self) -> Placement:
        """This process's part of the work."""

    @property
    def replica(self) -> tuple[int, int]:
        """Index and number of the processes with the same `masters`."""

    def num_passes(self, num_micro_batches: int) -> int:
        """Return the number of passes in which every process must take part."""

    def passes(self, *, train: bool) -> AbstractContextManager[None]:
        """Prepare passes through `body`; with `train`, sum the gradients of the masters at the end."""

    def head(self, vocab: range) -> Head:
        """Return the whole head of the current pass, within `passes`."""

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Compute the gradient of a pass; `is_last`: the last of this context."""

    def end_forward(self) -> None:
        """End a pass without gradient."""

    def raise_together(self, failures: Sequence[str]) -> None:
        """Raise NumericsError on all processes with a failure of any of them."""

    def norm(self, own: Tensor) -> Tensor:
        """Return the norm of the gradient from that of this process's parts."""

    def publish(self) -> None:
        """Pass updated masters on to the forward pass, and drop gradients."""

    def unshard(self, name: str, part: Tensor) -> Tensor:
        """Return the whole tensor of which `part`, shaped as `masters[name]`, is this process's part."""

    def parts(self, name: str, values: Tensor) -> Iterator[StatePart]:
        """Yield views of `values`, shaped as `masters[name]`, as boxes of a folder's tensors.

        Not collective.
        """

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the forward pass's current weights by parameter name, whole on every process."""

    def folder_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield them, and buffers, by the tensor names of a folder; on rank 0 only."""

    def unsharded(self, vocab: range) -> AbstractContextManager[tuple[nn.Module, Head]]:
        """Yield the current body and head, whole on every process."""


class WholeWeights:
    """Weights of a model in one process.

    In bfloat16 the masters are float32 copies, and gradients are summed in float32; the rounded weights are
    copied after each update.
    """

    def __init__(self, folder: Path, dtype: str, device: torch.device, options: PassOptions) -> None:
        self.facts = ModelFacts.read(folder)
        self._model = build_skeleton(folder, device, DTYPES[dtype])
        checkpoint = Checkpoint.open(folder)
        check_fit(self._model, self.facts, checkpoint)
        parts = parameter_parts(self.facts, checkpoint)
        tensors = checkpoint.read_all(part.tensor for own in parts.values() for part in own)
        # A copy: the file's pages are read-only and belong to the file cache.
        fill(self._model, dict(assembled(parts, tensors, device, DTYPES[dtype], copy=True)))
        self._model.tie_weights()
        self._model.requires_grad_(True)
        self.body: nn.Module = self._model.base_model
        set_layer_options(self.body, options)
        self._parameters = dict(self._model.named_parameters())
        self.masters: dict[str, Tensor] = {
            name: p if p.dtype in (torch.float32, torch.float64) else p.detach().float()
            for name, p in self._parameters.items()
        }
        self.shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}

    placement = UNSHARDED
    replica = (0, 1)

    def num_passes(self, num_micro_batches: int) -> int:
        return num_micro_batches

    @contextmanager
    def passes(self, *, train: bool) -> Iterator[None]:
        yield

    def head(self, vocab: range) -> Head:
        """Return the head, with a float32 gradient buffer: bfloat16 would round before the sum."""
        name = self.facts.head_parameter
        master, head = self.masters[name], head_of(self.facts, self._parameters, vocab)
        if master is self._parameters[name] or not torch.is_grad_enabled():
            return head
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        return replace(head, weight_grad=master.grad)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Sum bfloat16 gradients in float32, outside the parameters."""
        loss.backward()  # type: ignore[no-untyped-call]
        for name, master in self.masters.items():
            parameter = self._parameters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def end_forward(self) -> None:
        """Do nothing: the weights stay."""

    def raise_together(self, failures: Sequence[str]) -> None:
        if failures:
            raise NumericsError(failures[0])

    def norm(self, own: Tensor) -> Tensor:
        return own

    @torch.no_grad()
    def publish(self) -> None:
        for name, master in self.masters.items():
            if master is not self._parameters[name]:
                self._parameters[name].copy_(master)

    def unshard(self, name: str, part: Tensor) -> Tensor:
        return part

    def parts(self, name: str, values: Tensor) -> Iterator[StatePart]:
        for tensor, view in published(self.facts.model_type, name, values):
            yield StatePart.full(tensor, view)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p.detach()) for name, p in self._parameters.items())

    def folder_weights(self) -> Iterator[tuple[str, Tensor]]:
        tied_head = {self.facts.head_name} if self.facts.tied else set()
        for name, tensor in self._model.state_dict().items():
            if name not in tied_head:
                yield from published(self.facts.model_type, name, tensor)

    @contextmanager
    def unsharded(self, vocab: range) -> Iterator[tuple[nn.Module, Head]]:
        """Yield the model itself, not a copy."""
        yield self.body, head_of(self.facts, self._parameters, vocab)
