"""The weights of a torch student that is sharded over processes with FSDP2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mergeopd.loss.heads import Head
from mergeopd.models.causal import (
    DTYPES,
    assembled,
    build_skeleton,
    check_fit,
    empty,
    fill,
    head_of,
    parameter_parts,
)
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.experts import parts_of, published
from mergeopd.models.facts import ModelFacts
from mergeopd.rollout.joined import JoinedBody
from mergeopd.storage.boxes import Box
from mergeopd.storage.state_parts import StatePart
from mergeopd.student.layer_options import PassOptions, set_layer_options
from mergeopd.student.protocol import Placement
from mergeopd.student.shard_grid import ShardGrid


class ShardedWeights:
    """This process's rows of every parameter; `fully_shard` gathers one layer at a time for a pass.

    The shards have the masters' precision: in bfloat16, FSDP rounds what it gathers, and sums gradients in
    float32. Gradients are plain sums over the ranks, since the losses have global denominators.

    A tied head is the embedding, which FSDP gathers for every pass. Another head is outside of the body; it
    is gathered once for all passes of a call. The gradient of the head is summed in float32 over these
    passes, in a buffer of the head's size, and over the ranks at their end.
    """

    def __init__(
        self, folder: Path, dtype: str, device: torch.device, grid: ShardGrid, options: PassOptions
    ) -> None:
        self.facts = ModelFacts.read(folder)
        self._folder, self._grid, self._device, self._dtype = folder, grid, device, DTYPES[dtype]
        self._master_dtype = torch.float64 if dtype == "float64" else torch.float32
        model = build_skeleton(folder, device, self._dtype)
        checkpoint = Checkpoint.open(folder)
        check_fit(model, self.facts, checkpoint)
        self._stored = parameter_parts(self.facts, checkpoint)
        model.tie_weights()
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        fill(model, self._buffers(checkpoint))
        self._model, self.body = model, model.base_model
        prefix = f"{model.base_model_prefix}."
        in_body = {name: p for name, p in model.named_parameters() if name.startswith(prefix)}
        fill(model, {name: torch.empty_like(p, dtype=self._master_dtype) for name, p in in_body.items()})
        self.body.requires_grad_(True)
        set_layer_options(self.body, options)
        self._shard_body()
        read = {name: self._read(checkpoint, name) for name in self.shapes}
        self._assign({name.removeprefix(prefix): part for name, part in read.items() if name in in_body})
        self._parameters = {prefix + name: p for name, p in self.body.named_parameters()}
        self.masters = {
            name: _local(self._parameters[name]) if name in in_body else part for name, part in read.items()
        }
        self._outside = [name for name in self.shapes if name not in in_body]
        self._held: dict[str, Tensor] = {}  # whole tensors of the head, during passes
        self._head_grad: Tensor | None = None
        self._skeleton: nn.Module | None = None

    @property
    def placement(self) -> Placement:
        return self._grid.placement

    @property
    def replica(self) -> tuple[int, int]:
        return self._grid.replica, self._grid.data

    def num_passes(self, num_micro_batches: int) -> int:
        return self._grid.largest(num_micro_batches)

    @contextmanager
    def passes(self, *, train: bool) -> Iterator[None]:
        self._held = {name: self._gathered(name).requires_grad_(train) for name in self._outside}
        if train:
            count, *others = self.shapes[self.facts.head_parameter]
            shape = (self._grid.shard * self._grid.padded_rows(count), *others)
            self._head_grad = torch.zeros(shape, dtype=self._master_dtype, device=self._device)
        yield
        if train:
            self._sum_gradients()
        self._held, self._head_grad = {}, None

    def head(self, vocab: range) -> Head:
        """Return the head; one that is tied only after the body's forward, which gathers it."""
        name, held = self.facts.head_parameter, dict(self._held)
        if self.facts.tied:
            held[name] = self._model.get_parameter(name)
        weight_grad = None if self._head_grad is None else self._head_grad[: self.shapes[name][0]]
        return head_of(self.facts, held, vocab, weight_grad)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        if self._grid.data > 1:  # replicas are summed with the last pass
            self._fsdp.set_requires_all_reduce(is_last)
        loss.backward()  # type: ignore[no-untyped-call]

    def end_forward(self) -> None:
        # FSDP keeps the parameters of the outermost module for a backward pass. If they stayed, the next
        # forward would use them, although an update may have changed the weights.
        self._fsdp.reshard()

    def raise_together(self, failures: Sequence[str]) -> None:
        self._grid.raise_together(failures)

    def norm(self, own: Tensor) -> Tensor:
        return self._grid.norm(own)

    def publish(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def unshard(self, name: str, part: Tensor) -> Tensor:
        return self._grid.unshard(part, self.shapes[name][0])

    def parts(self, name: str, values: Tensor) -> Iterator[StatePart]:
        shape = self.shapes[name]
        rows = self._grid.rows(shape[0])
        parts = parts_of(self.facts.model_type, name, shape[0])
        num_pieces = 1 + parts[-1].piece
        for part in parts:
            if part.expert is None:
                box = Box((rows.start, *(0 for _ in shape[1:])), (len(rows), *shape[1:]))
                yield StatePart(part.tensor, shape, box, values)
            elif part.expert in rows:
                matrices = values[part.expert - rows.start]
                yield StatePart.full(part.tensor, matrices[part.rows(len(matrices) // num_pieces)])

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self._gathered(name)) for name in self.masters)

    def folder_weights(self) -> Iterator[tuple[str, Tensor]]:
        is_first = dist.get_rank() == 0
        if is_first:
            persistent = self._model.state_dict()
            yield from ((name, persistent[name]) for name in self._stored if name not in self.shapes)
        for name, tensor in self.weights():
            if is_first:
                yield from published(self.facts.model_type, name, tensor)

    @contextmanager
    def layerwise(self, vocab: range) -> Iterator[tuple[nn.Module, Head]]:
        """Yield a body that gathers one layer at a time, and the head; no rank has the whole model."""
        weights = {name: self._gathered(name) for name in self._outside}
        joined = JoinedBody(self.body, self._grid.shard_group, self._device)
        with torch.no_grad():  # afterwards the embedding, which may be the head, is in memory
            self.body(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self._device), use_cache=False)
        if self.facts.tied:
            weights[self.facts.head_parameter] = self._model.get_parameter(self.facts.head_parameter)
        try:
            yield joined, head_of(self.facts, weights, vocab)
        finally:
            self.end_forward()

    @contextmanager
    def unsharded(self, vocab: range) -> Iterator[tuple[nn.Module, Head]]:
        """Yield a copy that is whole on every rank and freed with the context."""
        if self._skeleton is None:
            self._skeleton = build_skeleton(self._folder, self._device, self._dtype)
            fill(self._skeleton, self._buffers(Checkpoint.open(self._folder)))
        weights = dict(self.weights())
        fill(self._skeleton, weights)
        self._skeleton.tie_weights()  # type: ignore[operator]
        try:
            yield cast(nn.Module, self._skeleton.base_model), head_of(self.facts, weights, vocab)
        finally:
            empty(self._skeleton)

    @property
    def _fsdp(self) -> FSDPModule:
        assert isinstance(self.body, FSDPModule)
        return self.body

    def _shard_body(self) -> None:
        # Masters may be wider than the forward pass; its inputs are not cast, as in one process.
        param_dtype = None if self._dtype == self._master_dtype else self._dtype
        policy = MixedPrecisionPolicy(param_dtype, self._master_dtype, cast_forward_inputs=False)
        layers = self.body.layers
        assert isinstance(layers, nn.ModuleList)
        for layer in layers:
            fully_shard(layer, mesh=self._grid.fsdp_mesh, mp_policy=policy)
        fully_shard(self.body, mesh=self._grid.fsdp_mesh, mp_policy=policy)
        for module in self.body.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                # Without this, gloo would get an operation that it does not have.
                module.set_force_sum_reduction_for_comms(True)

    def _buffers(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """Read what the folder stores beside parameters."""
        parts = {name: parts for name, parts in self._stored.items() if name not in self.shapes}
        tensors = checkpoint.read_all(part.tensor for own in parts.values() for part in own)
        return dict(assembled(parts, tensors, self._device, self._dtype, copy=True))

    def _read(self, checkpoint: Checkpoint, name: str) -> Tensor:
        """Read this rank's rows of a parameter; those of experts are their matrices."""
        count, *others = self.shapes[name]
        rows = self._grid.rows(count)
        own = torch.empty(len(rows), *others, dtype=self._master_dtype, device=self._device)
        for part in self._stored[name]:
            if part.expert is None:
                own.copy_(checkpoint.read_slice(part.tensor, rows.start, rows.stop))
            elif part.expert in rows:
                matrix = checkpoint.read(part.tensor)
                own[part.expert - rows.start, part.rows(len(matrix))] = matrix
        return own

    def _assign(self, parts: dict[str, Tensor]) -> None:
        """Give the sharded parameters of the body, on the meta device, this rank's rows."""
        weights = {}
        for name, parameter in self.body.named_parameters():
            assert isinstance(parameter, DTensor)
            weights[name] = DTensor.from_local(
                parts[name],
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        self.body.load_state_dict(weights, strict=False, assign=True)

    def _gathered(self, name: str) -> Tensor:
        """Return a whole parameter in the forward pass's dtype."""
        return self.unshard(name, self.masters[name].to(self._dtype))

    def _sum_gradients(self) -> None:
        """Give the masters their parts of the gradients, summed over the ranks."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self.masters[name].grad = _local(parameter.grad)
        assert self._head_grad is not None
        sums = {self.facts.head_parameter: self._head_grad}
        if (bias := self.facts.head_bias_name) is not None:
            sums[bias] = self._padded(bias, self._held[bias].grad)
        for name, padded in sums.items():
            own, master = self._grid.reduce_scatter(padded, self.shapes[name][0]), self.masters[name]
            master.grad = own if master.grad is None else master.grad.add_(own)

    def _padded(self, name: str, whole: Tensor | None) -> Tensor:
        """Return a gradient with padding for all ranks; zeros where this rank has none."""
        count = self.shapes[name][0]
        rows = self._grid.shard * self._grid.padded_rows(count)
        padded = torch.zeros(rows, dtype=self._master_dtype, device=self._device)
        if whole is not None:
            padded[:count] = whole
        return padded


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, with the same memory."""
    assert isinstance(tensor, DTensor)
    with torch.no_grad():
        own: Tensor = tensor.to_local()
    return own
