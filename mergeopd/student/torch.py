"""The torch student: a Hugging Face model in one process, or sharded over several, under AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mergeopd.batch.micro_batch import MicroBatch, MicroBatches
from mergeopd.errors import NumericsError
from mergeopd.loss.buffers import Workspace
from mergeopd.loss.fused import Objective
from mergeopd.loss.heads import Head
from mergeopd.loss.kernel_choice import KernelName
from mergeopd.loss.objective import DistillationObjective
from mergeopd.models.causal import response_hidden
from mergeopd.models.experts import published_shapes
from mergeopd.models.weight_files import MAX_FILE_BYTES, write_model
from mergeopd.recipe.training import Optimizer
from mergeopd.rollout.routes import forced, route_table
from mergeopd.storage.state_parts import SavedTensors, StatePart
from mergeopd.student.adamw import AdamW
from mergeopd.student.layer_options import PassOptions
from mergeopd.student.loss import Measured, MicroStats, Observe, check_norm, micro_loss, no_loss
from mergeopd.student.protocol import Placement, check_masters
from mergeopd.student.shard_grid import ShardGrid
from mergeopd.student.sharded_weights import ShardedWeights
from mergeopd.student.torch_state import load_parts, state_parts
from mergeopd.student.whole_weights import Weights, WholeWeights
from mergeopd.types import token_ids

# Run by a process without a micro-batch, so that it takes part in the collectives of the others' passes.
_EMPTY = MicroBatch((), (), (token_ids((0,)),), (token_ids(()),), (), torch.zeros(0, 0), torch.zeros(0))
_DEFAULT = PassOptions()


class TorchStudent:
    """A Hugging Face model under training.

    `dtype` is the dtype of the forward pass. In bfloat16 the optimizer works on float32 master weights and
    gradients summed in float32. Dropout is off: the student must be the policy that sampled. With a `grid`,
    every rank creates a student and makes the same calls.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        num_valid: int,
        optimizer: Optimizer,
        device: torch.device,
        kernel: KernelName = "auto",
        grid: ShardGrid | None = None,
        options: PassOptions = _DEFAULT,
    ) -> None:
        self._folder = folder
        self._device = device
        self._weights: Weights
        if grid is None:
            self._weights = WholeWeights(folder, dtype, device, options)
        else:
            self._weights = ShardedWeights(folder, dtype, device, grid, options)
        self._num_valid = num_valid
        self._adamw = AdamW(self._weights.masters, self._weights.shapes, optimizer)
        self._dtype = torch.float64 if dtype == "float64" else torch.float32
        self._packing, self._layerwise = options.packing, options.layerwise
        self._clip_grad = optimizer.clip_grad
        self._workspace, self._kernel = Workspace(), kernel

    @property
    def body(self) -> nn.Module:
        """The body under training; sharded on a grid."""
        return self._weights.body

    @property
    def placement(self) -> Placement:
        return self._weights.placement

    @property
    def vocab(self) -> range:
        return range(self._num_valid)

    @property
    def statistics_dtype(self) -> torch.dtype:
        return self._dtype

    def unsharded(self) -> AbstractContextManager[tuple[nn.Module, Head]]:
        """Yield the current body and head; on a grid a copy, or layer by layer if the options say so."""
        if self._layerwise and isinstance(self._weights, ShardedWeights):
            return self._weights.layerwise(self.vocab)
        return self._weights.unsharded(self.vocab)

    def folder_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the forward pass's current weights and buffers by the names of `export`, on rank 0."""
        return self._weights.folder_weights()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the forward pass's current weights by parameter name."""
        return self._weights.weights()

    def master_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the optimizer's current weights by parameter name."""
        return ((name, self._weights.unshard(name, p.detach())) for name, p in self._weights.masters.items())

    def accumulate_gradients(
        self, micro_batches: MicroBatches, objective: DistillationObjective, observe: Observe | None = None
    ) -> list[MicroStats]:
        def per_token(micro: MicroBatch) -> Objective:
            return objective.per_token(
                micro.teacher_weight_KN, micro.nll_weight_N, micro.policy, micro.term_weight_KDN
            )

        return self._run(micro_batches, per_token, Measured.of(objective, observe), train=True)

    def score(self, micro_batches: MicroBatches, what: Measured) -> list[MicroStats]:
        with torch.no_grad():
            return self._run(micro_batches, lambda _: no_loss, what, train=False)

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradient accumulated so far, by parameter name, in master precision; on rank 0.

        Collective. For inspection: every rank needs memory for all of it.
        """
        summed = {n: p.grad for n, p in self._weights.masters.items() if p.grad is not None}
        whole = {name: self._weights.unshard(name, gradient) for name, gradient in summed.items()}
        return whole if self.placement.dp_rank == 0 else {}

    def optimizer_step(self, lr: float) -> float:
        masters = list(self._weights.masters.values())
        own = torch.nn.utils.get_total_norm([p.grad for p in masters if p.grad is not None])
        norm = self._weights.norm(own)
        length = float(norm)
        check_norm(length)
        if self._clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(masters, self._clip_grad, norm)
        self._adamw.step(lr)
        self._weights.publish()
        return length

    def state(self) -> Iterator[StatePart]:
        return state_parts(self._weights, self._adamw)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = published_shapes(self._weights.facts.model_type, self._weights.shapes)
        return {f"master.{name}": cast(tuple[int, ...], shape) for name, shape in shapes.items()}

    def load_state(self, tensors: SavedTensors) -> None:
        check_masters(self.state_shapes(), tensors.shapes)
        load_parts(tensors, self._weights, self._adamw)
        self._weights.publish()

    def export(self, folder: Path) -> None:
        tensors = self.folder_weights()
        if self.placement.dp_rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_model(tensors, self._folder, folder, MAX_FILE_BYTES)
        for _ in tensors:
            pass  # the other ranks only send
        if len(self.placement.replica_ranks) > 1:
            dist.barrier()

    def release(self) -> None:
        self.__dict__.clear()

    def _hidden(self, micro: MicroBatch) -> Tensor:
        sequences = micro.prompts, micro.responses
        return response_hidden(self.body, *sequences, self._device, micro.trained, packing=self._packing)

    def _replayed(self, micro: MicroBatch) -> AbstractContextManager[None]:
        lengths = [len(p) + len(r) for p, r in zip(micro.prompts, micro.responses, strict=True)]
        table = route_table(micro.routes, max(lengths), self._device)
        if table is not None and self._packing:
            table = torch.cat([own[:length] for own, length in zip(table, lengths, strict=True)])[None]
        return forced(self.body, table)

    def _run(
        self,
        micro_batches: MicroBatches,
        per_token: Callable[[MicroBatch], Objective],
        what: Measured,
        *,
        train: bool,
    ) -> list[MicroStats]:
        """Make the passes of all micro-batches; failures are raised after them, when all processes can."""
        statistics: list[MicroStats] = []
        failures: list[str] = []
        num_passes, stream = self._weights.num_passes(len(micro_batches)), iter(micro_batches)
        with self._weights.passes(train=train):
            for number in range(num_passes):
                micro = next(stream, None)
                own = _EMPTY if micro is None else micro
                with self._replayed(own):
                    hidden = self._hidden(own)
                    loss = None
                    if micro is not None:
                        head = self._weights.head(self.vocab)
                        try:
                            loss, stats = micro_loss(
                                hidden, head, micro, per_token(micro), what, self._workspace, self._kernel
                            )
                            statistics.append(stats)
                        except NumericsError as error:
                            failures.append(str(error))
                    if train:
                        # Without a loss the backward pass is for the other processes alone.
                        loss = hidden.sum() * 0.0 if loss is None else loss
                        self._weights.backward(loss, is_last=number + 1 == num_passes)
                    else:
                        self._weights.end_forward()
        self._weights.raise_together(failures)
        return statistics
