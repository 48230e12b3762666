"""The reference student: one process, one device, AdamW over float32 master weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mergeopd.batch.micro_batch import MicroBatch, MicroBatches
from mergeopd.loss.buffers import Workspace
from mergeopd.loss.fused import Objective
from mergeopd.loss.heads import Head
from mergeopd.loss.kernel_choice import KernelName
from mergeopd.loss.objective import DistillationObjective
from mergeopd.models.causal import (
    DTYPES,
    assembled,
    build_skeleton,
    check_fit,
    fill,
    head_of,
    parameter_parts,
    response_hidden,
)
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.experts import published
from mergeopd.models.facts import ModelFacts
from mergeopd.models.weight_files import MAX_FILE_BYTES, write_model
from mergeopd.recipe.training import Optimizer
from mergeopd.rollout.routes import forced, route_table
from mergeopd.storage.state_parts import SavedTensors, StatePart
from mergeopd.student.loss import Measured, MicroStats, Observe, check_norm, micro_loss, no_loss
from mergeopd.student.protocol import UNSHARDED, Placement, check_masters


class TorchStudent:
    """A Hugging Face model under training.

    `dtype` is the dtype of the forward pass. In bfloat16 the optimizer works on float32 master weights and
    gradients summed in float32, and the rounded weights are copied after each update. Dropout is off: the
    student must be the policy that sampled.
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
    ) -> None:
        self._folder = folder
        self._device = device
        self._facts = ModelFacts.read(folder)
        self._model = build_skeleton(folder, device, DTYPES[dtype])
        checkpoint = Checkpoint.open(folder)
        check_fit(self._model, self._facts, checkpoint)
        parts = parameter_parts(self._facts, checkpoint)
        tensors = checkpoint.read_all(part.tensor for own in parts.values() for part in own)
        # A copy: the file's pages are read-only and belong to the file cache.
        fill(self._model, dict(assembled(parts, tensors, device, DTYPES[dtype], copy=True)))
        self._model.tie_weights()
        self._model.requires_grad_(True)
        self.body = self._model.base_model
        self._num_valid = num_valid
        self._parameters = dict(self._model.named_parameters())
        self._masters = {
            name: p if p.dtype in (torch.float32, torch.float64) else p.detach().float()
            for name, p in self._parameters.items()
        }
        masters = self._masters.values()
        matrices, vectors = [p for p in masters if p.ndim > 1], [p for p in masters if p.ndim <= 1]
        decays = ((matrices, optimizer.weight_decay), (vectors, 0.0))
        groups = [{"params": parameters, "weight_decay": decay} for parameters, decay in decays]
        self._adamw = torch.optim.AdamW(groups, 0.0, optimizer.betas, optimizer.eps, fused=True)
        self._masters_are_double = DTYPES[dtype] == torch.float64
        self._clip_grad = optimizer.clip_grad
        self._workspace, self._kernel = Workspace(), kernel

    @property
    def placement(self) -> Placement:
        return UNSHARDED

    @property
    def vocab(self) -> range:
        return range(self._num_valid)

    @property
    def statistics_dtype(self) -> torch.dtype:
        return torch.float64 if self._masters_are_double else torch.float32

    @property
    def head(self) -> Head:
        """The current prediction head, over the true vocabulary."""
        return head_of(self._facts, self._parameters, self.vocab)

    @contextmanager
    def unsharded(self) -> Iterator[tuple[nn.Module, Head]]:
        """Yield the current body and head; not copies."""
        yield self.body, self.head

    def folder_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the forward pass's current weights and buffers by the names of `export`; not copies."""
        tied_head = {self._facts.head_name} if self._facts.tied else set()
        for name, tensor in self._model.state_dict().items():
            if name not in tied_head:
                yield from self._published(name, tensor)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the forward pass's current weights by parameter name; not copies."""
        return ((name, p.detach()) for name, p in self._parameters.items())

    def master_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the optimizer's current weights by parameter name; not copies."""
        return ((name, p.detach()) for name, p in self._masters.items())

    def accumulate_gradients(
        self, micro_batches: MicroBatches, objective: DistillationObjective, observe: Observe | None = None
    ) -> list[MicroStats]:
        statistics = []
        what = Measured.of(objective, observe)
        for micro in micro_batches:
            per_token = objective.per_token(
                micro.teacher_weight_KN, micro.nll_weight_N, micro.policy, micro.term_weight_KDN
            )
            with self._replayed(micro):
                loss, stats = self._fused(micro, per_token, what, self._head_to_train())
                loss.backward()  # type: ignore[no-untyped-call]
            self._collect_gradients()
            statistics.append(stats)
        return statistics

    def score(self, micro_batches: MicroBatches, what: Measured) -> list[MicroStats]:
        statistics = []
        for micro in micro_batches:
            with torch.no_grad(), self._replayed(micro):
                _, stats = self._fused(micro, no_loss, what, self.head)
            statistics.append(stats)
        return statistics

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradient accumulated so far, by parameter name, in master precision."""
        return {name: p.grad for name, p in self._masters.items() if p.grad is not None}

    def optimizer_step(self, lr: float) -> float:
        norm = torch.nn.utils.get_total_norm(list(self.gradients().values()))
        length = float(norm)
        check_norm(length)
        if self._clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(list(self._masters.values()), self._clip_grad, norm)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self._publish()
        return length

    def state(self) -> Iterator[StatePart]:
        for name, p in self._masters.items():
            for tensor, values in self._published(name, p.detach()):
                yield StatePart.full(f"master.{tensor}", values)
            for key, value in self._adamw.state.get(p, {}).items():
                for tensor, values in self._published(name, value.expand_as(p)):
                    yield StatePart.full(f"adamw.{key}.{tensor}", values if value.ndim else value)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            f"master.{tensor}": tuple(values.shape)
            for name, p in self._masters.items()
            for tensor, values in self._published(name, p)
        }

    def load_state(self, tensors: SavedTensors) -> None:
        saved = tensors.shapes
        check_masters(self.state_shapes(), saved)
        with torch.no_grad():
            for name, p in self._masters.items():
                self._load(name, p, "master", tensors)
                first, _ = next(self._published(name, p))
                if f"adamw.step.{first}" in saved:
                    # Fused AdamW keeps its step count, too, on the parameter's device.
                    step = tensors.read(f"adamw.step.{first}").to(p.device, copy=True)
                    moments = {"step": step}
                    for key in ("exp_avg", "exp_avg_sq"):
                        moments[key] = torch.empty_like(p)
                        self._load(name, moments[key], f"adamw.{key}", tensors)
                    self._adamw.state[p] = moments
        self._publish()

    def _load(self, name: str, values: Tensor, key: str, tensors: SavedTensors) -> None:
        for tensor, part in self._published(name, values):
            part.copy_(tensors.read(f"{key}.{tensor}"))

    def _published(self, name: str, values: Tensor) -> Iterator[tuple[str, Tensor]]:
        return published(self._facts.model_type, name, values)

    def export(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_model(self.folder_weights(), self._folder, folder, MAX_FILE_BYTES)

    def release(self) -> None:
        self.__dict__.clear()

    def _fused(
        self, micro: MicroBatch, per_token: Objective, what: Measured, head: Head
    ) -> tuple[Tensor, MicroStats]:
        hidden = response_hidden(self.body, micro.prompts, micro.responses, self._device, micro.trained)
        return micro_loss(hidden, head, micro, per_token, what, self._workspace, self._kernel)

    def _replayed(self, micro: MicroBatch) -> AbstractContextManager[None]:
        width = max(len(p) + len(r) for p, r in zip(micro.prompts, micro.responses, strict=True))
        return forced(self.body, route_table(micro.routes, width, self._device))

    def _head_to_train(self) -> Head:
        """Return the head with a float32 gradient buffer: bfloat16 would round before the sum."""
        name = self._facts.head_parameter
        master = self._masters[name]
        if master is self._parameters[name]:
            return self.head
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        return replace(self.head, weight_grad=master.grad)

    def _collect_gradients(self) -> None:
        """Sum bfloat16 gradients in float32, outside the parameters."""
        for name, master in self._masters.items():
            parameter = self._parameters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    @torch.no_grad()
    def _publish(self) -> None:
        for name, master in self._masters.items():
            if master is not self._parameters[name]:
                self._parameters[name].copy_(master)
