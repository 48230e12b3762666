"""The grid of processes and Megatron's process groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from mergeopd.student.megatron import shim
from mergeopd.student.protocol import Placement

# Order of ranks: tensor-parallel neighbours, context-parallel ones, data-parallel copies, pipeline stages.
_ORDER = "tp-cp-ep-dp-pp"


@dataclass(frozen=True, eq=False)
class Grid:
    """This process's position among `tensor` x `context` x `data` x `pipeline` processes.

    Of a stage's processes, `expert` neighbours divide the experts of each layer, whole:
    number `expert_rank`; `expert_data` of them have the same experts. `groups` is Megatron's
    ProcessGroupCollection; `sequence_parallel` splits activations between the tensor-parallel regions along
    the sequence.
    """

    tensor: int
    context: int
    pipeline: int
    data: int
    expert: int
    expert_data: int
    tensor_rank: int
    context_rank: int
    stage: int
    data_rank: int
    expert_rank: int
    sequence_parallel: bool
    groups: Any

    @classmethod
    def open(
        cls,
        *,
        tensor: int,
        pipeline: int,
        context: int = 1,
        expert: int = 1,
        sequence_parallel: bool = False,
    ) -> Grid:
        """Create the groups from all processes of the (initialised) default group; once per process.

        Raises ValueError when the sizes do not divide their number, or for sequence parallelism over a single
        rank.
        """
        world = dist.get_world_size()
        if world % (tensor * context * pipeline):
            raise ValueError(f"{world} processes cannot be split into {tensor} x {context} x {pipeline}")
        if world % (expert * pipeline):
            raise ValueError(f"{world} processes cannot be split into {expert} x {pipeline} for experts")
        if sequence_parallel and tensor == 1:
            raise ValueError("sequence_parallel needs tensor > 1")
        shim.install()
        from megatron.core import parallel_state
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        parallel_state.initialize_model_parallel(
            tensor,
            pipeline,
            context_parallel_size=context,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=1,
            order=_ORDER,
            create_gloo_process_groups=False,
        )
        # Nothing is random here (no dropout, weights are read), but Megatron forks this state anyway.
        model_parallel_cuda_manual_seed(0)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        return cls(
            tensor=tensor,
            context=context,
            pipeline=pipeline,
            data=groups.dp.size(),
            expert=expert,
            expert_data=groups.expt_dp.size(),
            tensor_rank=groups.tp.rank(),
            context_rank=groups.cp.rank(),
            stage=groups.pp.rank(),
            data_rank=groups.dp.rank(),
            expert_rank=groups.ep.rank(),
            sequence_parallel=sequence_parallel,
            groups=groups,
        )

    @property
    def is_last_stage(self) -> bool:
        """Whether this process has the last hidden states, the head and the loss."""
        return self.stage == self.pipeline - 1

    @property
    def holders(self) -> int:
        """Number of processes with the same shard of the weights, which share the optimizer's state."""
        return self.context * self.data

    def rank_of(self, tensor_rank: int, stage: int, copy: int = 0, context_rank: int = 0) -> int:
        return tensor_rank + self.tensor * (context_rank + self.context * (copy + self.data * stage))

    def own_experts(self, count: int) -> range:
        """Return this process's experts of a layer's `count`."""
        size = count // self.expert
        return range(self.expert_rank * size, (self.expert_rank + 1) * size)

    def rank_of_expert(self, number: int, count: int, stage: int) -> int:
        """Return the first process of a stage that has expert `number` of `count`."""
        return number // (count // self.expert) + self.tensor * self.holders * stage

    @property
    def placement(self) -> Placement:
        by_copy = [
            [
                self.rank_of(t, stage, copy, c)
                for stage in range(self.pipeline)
                for c in range(self.context)
                for t in range(self.tensor)
            ]
            for copy in range(self.data)
        ]
        # On the last stage all ranks of a copy share the head's rows, whichever positions they compute.
        sharing = self.tensor * self.context
        return Placement(
            dp_rank=self.data_rank,
            replica_ranks=tuple(tuple(ranks) for ranks in by_copy),
            loss_ranks=tuple(tuple(ranks[-sharing:]) for ranks in by_copy),
            has_loss=self.is_last_stage,
            reports_stats=self.is_last_stage and self.tensor_rank == self.context_rank == 0,
        )
