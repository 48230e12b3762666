"""The grid of processes of a sharded torch student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mergeopd.errors import NumericsError
from mergeopd.student.protocol import Placement

_DATA, _SHARD = "data", "shard"
# Their names since torch 2.13, which warns of the former ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True, eq=False)
class ShardGrid:
    """`data` replicas of a model that is sharded over `shard` processes; neighbouring ranks share a model.

    Every process is a data-parallel copy of its own: it has other micro-batches than its neighbours.
    """

    mesh: DeviceMesh

    @classmethod
    def open(cls, shard: int, device: torch.device) -> ShardGrid:
        """Create the groups from all processes of the (initialised) default group; once per process.

        Raises ValueError when `shard` does not divide their number.
        """
        world = dist.get_world_size()
        if world % shard:
            raise ValueError(f"{world} processes cannot be split into groups of {shard}")
        mesh = init_device_mesh(device.type, (world // shard, shard), mesh_dim_names=(_DATA, _SHARD))
        return cls(mesh)

    @property
    def data(self) -> int:
        return self.mesh[_DATA].size()

    @property
    def shard(self) -> int:
        return self.mesh[_SHARD].size()

    @property
    def replica(self) -> int:
        """Index of this process's replica."""
        return self.mesh[_DATA].get_local_rank()

    @property
    def shard_group(self) -> dist.ProcessGroup:
        """The processes that share this one's replica."""
        return self.mesh[_SHARD].get_group()

    @property
    def fsdp_mesh(self) -> DeviceMesh:
        """The mesh for `fully_shard`: two-dimensional (hybrid sharding) if there are several replicas."""
        return self.mesh if self.data > 1 else self.mesh[_SHARD]

    @property
    def placement(self) -> Placement:
        ranks = tuple((rank,) for rank in range(dist.get_world_size()))
        return Placement(dist.get_rank(), ranks, ranks, has_loss=True, reports_stats=True)

    def rows(self, count: int) -> range:
        """Return this rank's rows of `count`, as `fully_shard` and `torch.chunk` split them."""
        size = self.padded_rows(count)
        start = min(self.mesh[_SHARD].get_local_rank() * size, count)
        return range(start, min(start + size, count))

    def padded_rows(self, count: int) -> int:
        """Return the rows of every rank's part of a tensor of `count` rows, padding included."""
        return -(-count // self.shard)

    @torch.no_grad()
    def unshard(self, own: Tensor, count: int) -> Tensor:
        """Gather the tensor of `count` rows of which `own` are this rank's. Collective."""
        padded = own.contiguous()
        if len(own) < self.padded_rows(count):
            padded = own.new_zeros(self.padded_rows(count), *own.shape[1:])
            padded[: len(own)] = own
        whole = own.new_empty(self.shard * len(padded), *own.shape[1:])
        _all_gather(whole, padded, group=self.shard_group)
        return whole[:count]

    @torch.no_grad()
    def reduce_scatter(self, padded: Tensor, count: int) -> Tensor:
        """Sum tensors of `shard * padded_rows(count)` rows over all ranks; return this rank's. Collective."""
        own = padded.new_empty(self.padded_rows(count), *padded.shape[1:])
        _reduce_scatter(own, padded, group=self.shard_group)
        if self.data > 1:
            dist.all_reduce(own, group=self.mesh[_DATA].get_group())
        return own[: len(self.rows(count))]

    def norm(self, own: Tensor) -> Tensor:
        """Return the norm of a sharded vector from the norm of this rank's part. Collective."""
        squared = own.double().square() / self.data
        # Over replicas, too, although their parts are equal: all must see a norm that is not finite.
        dist.all_reduce(squared)
        return squared.sqrt().to(own.dtype)

    def largest(self, count: int) -> int:
        """Return the largest of all ranks' counts. Collective."""
        counts = torch.tensor(count, device=self.mesh.device_type)
        dist.all_reduce(counts, op=dist.ReduceOp.MAX)
        return int(counts)

    def raise_together(self, failures: Sequence[str]) -> None:
        """Raise NumericsError on all ranks with the first failure of any rank. Collective."""
        everyone: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, failures[0] if failures else None)
        failure = next((text for text in everyone if text is not None), None)
        if failure is not None:
            raise NumericsError(failure)
