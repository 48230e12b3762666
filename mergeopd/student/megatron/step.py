"""The student on a grid of processes: weights, gradients, AdamW, export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor, nn

from mergeopd.batch.micro_batch import MicroBatch, MicroBatches
from mergeopd.loss.fused import Objective
from mergeopd.loss.heads import Head
from mergeopd.loss.kernel_choice import KernelName
from mergeopd.loss.objective import DistillationObjective
from mergeopd.models.causal import DTYPES, build_skeleton, check_fit, empty, fill, head_of
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.facts import ModelFacts
from mergeopd.recipe.training import Optimizer
from mergeopd.storage.state_parts import SavedTensors, StatePart
from mergeopd.student.loss import Measured, MicroStats, Observe, check_norm, no_loss
from mergeopd.student.megatron.architecture import Architecture
from mergeopd.student.megatron.grid import Grid
from mergeopd.student.megatron.layout import tensor_shapes, vocab_rows
from mergeopd.student.megatron.model import build_model
from mergeopd.student.megatron.optimizer import MainParameters, build_adamw
from mergeopd.student.megatron.passes import Passes
from mergeopd.student.megatron.router import StageRoutes
from mergeopd.student.megatron.state import load_parts, state_parts
from mergeopd.student.megatron.weights import by_parameter, export, named, read_shards, whole_tensors
from mergeopd.student.protocol import Placement, check_masters

# The attribute in which Megatron accumulates a parameter's gradient.
_SUM = "main_grad"


class MegatronStudent:
    """A Hugging Face model under training on a grid; every rank creates one and makes the same calls.

    `dtype` is the dtype of the forward pass: float32, or bfloat16 with float32 main parameters and gradients
    summed in float32. The optimizer's state is sharded over data-parallel copies.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        num_valid: int,
        optimizer: Optimizer,
        grid: Grid,
        device: torch.device,
        recompute: bool = False,
        layers: str = "auto",
        kernel: KernelName = "auto",
    ) -> None:
        """Build the model on this rank and read its weights.

        `recompute` keeps only the input of each layer and recomputes the layer in the backward pass.
        `layers`: `local` for Megatron's own, `transformer_engine`, or `auto` for the latter where it runs.
        `kernel` is that of `fused_loss`.

        Raises ModelError, before weights are read, for a model that is not mapped or does not fit the grid,
        and ValueError for float64, which Megatron's layers do not support.
        """
        if dtype == "float64":
            raise ValueError("student.dtype: float64 needs student.backend: torch")
        facts = ModelFacts.read(folder)
        self._arch = Architecture.read(facts)
        self._grid, self._num_valid, self._clip_grad = grid, num_valid, optimizer.clip_grad
        self._skeleton = build_skeleton(folder, device, DTYPES[dtype])
        check_fit(self._skeleton, facts, Checkpoint.open(folder))
        inv_freq = self._skeleton.base_model.rotary_emb.inv_freq
        self._model = build_model(
            self._arch, grid, DTYPES[dtype], device, inv_freq, recompute=recompute, layers=layers
        )
        read_shards(self._model, self._arch, grid)
        buffers = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=False,
            use_distributed_optimizer=grid.holders > 1
            or (self._arch.experts is not None and grid.expert_data > 1),
        )
        self._ddp = DistributedDataParallel(
            self._model.config, buffers, self._model, pg_collection=grid.groups
        )
        self._adamw = build_adamw(self._ddp, optimizer, DTYPES[dtype], grid)
        self._main = MainParameters(self._adamw, grid)
        routes = StageRoutes(self._model, self._arch, grid, device)
        self._passes = Passes(self._ddp, self._model.config, self._head, routes, grid, device, kernel)
        self._like = torch.empty((), device=device)  # dtype and device of gradients, main parameters, moments
        self._is_summed = False

    @property
    def statistics_dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def vocab(self) -> range:
        start = self._grid.tensor_rank * vocab_rows(self._arch, self._grid.tensor) // self._grid.tensor
        rows = self._scored_rows
        return range(min(start + rows.start, self._num_valid), min(start + rows.stop, self._num_valid))

    @property
    def placement(self) -> Placement:
        return self._grid.placement

    @property
    def shards(self) -> dict[str, Tensor]:
        """Return this rank's shards of the forward pass's weights by Megatron's names; not copies."""
        return {name: p.detach() for name, p in named(self._model).items()}

    @contextmanager
    def unsharded(self) -> Iterator[tuple[nn.Module, Head]]:
        """Yield the current model, unsharded on every rank, as in transformers; freed with the context."""
        weights = dict(self.weights())
        fill(self._skeleton, weights)
        self._skeleton.tie_weights()
        try:
            yield self._skeleton.base_model, head_of(self._arch.facts, weights, range(self._num_valid))
        finally:
            empty(self._skeleton)

    def folder_weights(self) -> Iterator[tuple[str, Tensor]]:
        shards = self.shards
        return self._whole(shards.__getitem__, next(iter(shards.values())))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        shards = self.shards
        like = next(iter(shards.values()))
        return by_parameter(self._whole(shards.__getitem__, like, everywhere=True), self._arch, like)

    def master_weights(self) -> Iterator[tuple[str, Tensor]]:
        parameters = named(self._model)
        read = self._main.read
        whole = self._whole(lambda name: read(parameters[name], "param"), self._like, everywhere=True)
        return by_parameter(whole, self._arch, self._like)

    def accumulate_gradients(
        self, micro_batches: MicroBatches, objective: DistillationObjective, observe: Observe | None = None
    ) -> tuple[MicroStats, ...]:
        """Add the gradient of this data-parallel copy's micro-batches, if there are any.

        All ranks of a copy pass the same prompts, responses and flags. Targets and weights are read only on
        the last stage, which returns statistics of each micro-batch. Collective.

        Raises NumericsError on all ranks when the student's or a teacher's distribution is not finite, and
        RuntimeError between `gradients` and `optimizer_step`.
        """
        if self._is_summed:
            raise RuntimeError("the gradient is already summed over the ranks; call optimizer_step first")

        def per_token(micro: MicroBatch) -> Objective:
            return objective.per_token(
                micro.teacher_weight_KN, micro.nll_weight_N, micro.policy, micro.term_weight_KDN
            )

        return self._passes.run(micro_batches, per_token, Measured.of(objective, observe), backward=True)

    @torch.no_grad()
    def score(self, micro_batches: MicroBatches, what: Measured) -> tuple[MicroStats, ...]:

        return self._passes.run(micro_batches, lambda micro: no_loss, what, backward=False)

    def gradients(self) -> dict[str, Tensor]:
        """Return the accumulated gradient, unsharded float32, by parameter name; empty except on rank 0.

        Collective. For inspection: rank 0 needs memory for all of it.
        """
        self._sum_gradients(everywhere=True)
        parameters = named(self._model)
        whole = self._whole(lambda name: getattr(parameters[name], _SUM), self._like)
        return dict(by_parameter(whole, self._arch, self._like))

    def optimizer_step(self, lr: float) -> float:
        self._sum_gradients(everywhere=False)
        self._adamw.prepare_grads()
        norm = float(self._adamw.get_grad_norm())
        check_norm(norm)
        if self._clip_grad is not None:
            parameters = [p for group in self._adamw.param_groups for p in group["params"]]
            clip_grad_by_total_norm_fp32(parameters, self._clip_grad, norm)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step_with_ready_grads()
        self._adamw.zero_grad()
        self._ddp.zero_grad_buffer()
        self._is_summed = False
        return norm

    def export(self, folder: Path) -> None:
        export(self.folder_weights(), self._arch.facts.folder, folder)

    def release(self) -> None:
        self.__dict__.clear()

    def state(self) -> Iterator[StatePart]:
        """Yield this rank's boxes by the names of `TorchStudent.state`, whose state any grid can restore.

        Raises RuntimeError for an optimizer other than torch's AdamW.
        """
        return state_parts(self._model, self._main, self._arch, self._grid)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {f"master.{name}": shape for name, shape in tensor_shapes(self._arch).items()}

    def load_state(self, tensors: SavedTensors) -> None:
        """Restore `state()` of either backend. Raises StorageError when it belongs to another model."""
        check_masters(self.state_shapes(), tensors.shapes)
        load_parts(tensors, self._model, self._main, self._arch, self._grid)
        if self._main.is_sharded:  # each has read its own part
            self._ddp.start_param_sync()

    def _head(self) -> Head:
        facts, rows = self._arch.facts, self._scored_rows
        return head_of(
            facts, {facts.head_parameter: self._model.head_weight[rows.start : rows.stop]}, self.vocab
        )

    @property
    def _scored_rows(self) -> range:
        """Rows of this shard of the head that this process scores: context-parallel ranks divide them."""
        rows, parts = vocab_rows(self._arch, self._grid.tensor) // self._grid.tensor, self._grid.context
        return range(
            *(part * rows // parts for part in (self._grid.context_rank, self._grid.context_rank + 1))
        )

    def _whole(
        self, part_of: Callable[[str], Tensor], like: Tensor, *, everywhere: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        return whole_tensors(part_of, like, self._arch, self._grid, everywhere=everywhere)

    def _sum_gradients(self, *, everywhere: bool) -> None:
        """Sum over ranks with the same parameters, shared embeddings and split sequences; once per update.

        Must run after the last micro-batch, since a second sum would count twice. A copy of the model needs
        the sum for its shard of the parameters; with `everywhere` it gets the other shards too.
        """
        if not self._is_summed:
            finalize_model_grads([self._ddp], pg_collection=self._grid.groups, force_all_reduce=everywhere)
            self._is_summed = True
