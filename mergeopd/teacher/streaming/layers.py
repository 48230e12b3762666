"""Run the layers of a Hugging Face body one at a time, with the arguments that the model gives them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergeopd.models.residency import ARGUMENT_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Arguments:
    """Arguments of a layer besides the hidden states, such as masks and rotary embeddings."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


class _Recorder(nn.Module):
    """Takes a layer's place: records its arguments and returns the hidden states that it gets.

    With a `replacement`, it returns that. Other attributes are the layer's.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Not a submodule: the model must not find the layer's parameters here.
        self.__dict__["layer"] = layer
        self.received: Tensor | None = None
        self.replacement: Tensor | None = None
        self.arguments: Arguments | None = None
        self.returns_tuple = False

    def forward(self, hidden: Tensor, *positional: Any, **named: Any) -> Tensor | tuple[Tensor]:
        self.received = hidden
        self.arguments = Arguments(positional, named)
        out = hidden if self.replacement is None else self.replacement
        return (out,) if self.returns_tuple else out

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)


@dataclass(eq=False)
class LayeredBody:
    """A body whose layers are called from outside; everything around them is computed by the model itself.

    So it needs nothing of an architecture but that `body.layers` are called in turn, each with the hidden
    states first. Arguments depend on the shape of a batch alone, as there is no padding mask; those of as
    many shapes as fit into `ARGUMENT_BYTES` are kept, the others are computed again for every layer.
    """

    body: PreTrainedModel
    layers: list[nn.Module] = field(init=False)
    _recorders: list[_Recorder] = field(init=False)
    _kept: dict[torch.Size, list[Arguments]] = field(init=False, default_factory=dict)
    _kept_bytes: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.layers = list(self.body.layers)
        self._recorders = [_Recorder(layer) for layer in self.layers]

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Take the layers out of the body until the context ends."""
        layers, self.body.layers = self.body.layers, nn.ModuleList(self._recorders)
        # It concerns gradients alone, and may exceed the rows of an embedding that has those in use only.
        embedding = self.body.get_input_embeddings()
        padding, embedding.padding_idx = embedding.padding_idx, None
        try:
            yield
        finally:
            self.body.layers, embedding.padding_idx = layers, padding
            self.forget()

    def embed(self, ids: Tensor) -> Tensor:
        """Return the hidden states `[B, T, d]` that the first layer gets for token ids `[B, T]`."""
        self._run(input_ids=ids)
        hidden = self._recorders[0].received
        assert hidden is not None
        self._keep(hidden.shape)
        self._clear()
        return hidden

    def layer(self, index: int, hidden: Tensor) -> Tensor:
        """Return the output of a layer, whose weights must be in memory."""
        arguments = self._arguments(hidden)[index]
        out = self.layers[index](hidden, *arguments.positional, **arguments.named)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def finish(self, hidden: Tensor) -> Tensor:
        """Return the last hidden states of the output of the last layer: after the final norm."""
        last = self._recorders[-1]
        last.replacement = hidden
        try:
            return self._run(inputs_embeds=hidden)
        finally:
            last.replacement = None
            self._clear()

    def forget(self) -> None:
        """Free the arguments that are kept."""
        self._kept.clear()
        self._kept_bytes = 0
        self._clear()

    def _arguments(self, hidden: Tensor) -> list[Arguments]:
        kept = self._kept.get(hidden.shape)
        if kept is not None:
            return kept
        self._run(inputs_embeds=hidden)
        arguments = self._recorded()
        self._clear()
        return arguments

    def _run(self, **inputs: Tensor) -> Tensor:
        """Run everything but the layers; find out whether the model expects a tuple from them."""
        hidden: Tensor = self.body(use_cache=False, **inputs).last_hidden_state
        if hidden.dim() < 3:
            # It has taken the first of what it was given: layers return a tuple.
            for recorder in self._recorders:
                recorder.returns_tuple = True
            hidden = self.body(use_cache=False, **inputs).last_hidden_state
        return hidden

    def _recorded(self) -> list[Arguments]:
        recorded = [recorder.arguments for recorder in self._recorders]
        return [arguments for arguments in recorded if arguments is not None]

    def _keep(self, shape: torch.Size) -> None:
        if shape in self._kept:
            return
        arguments = self._recorded()
        num_bytes = _storage_bytes(arguments)
        if self._kept_bytes + num_bytes <= ARGUMENT_BYTES:
            self._kept[shape] = arguments
            self._kept_bytes += num_bytes

    def _clear(self) -> None:
        for recorder in self._recorders:
            recorder.received = recorder.arguments = None


def _storage_bytes(arguments: Iterable[Arguments]) -> int:
    """Return the bytes of all tensors among arguments, each memory once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for own in arguments
        for tensor in _tensors((own.positional, own.named))
    }
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
