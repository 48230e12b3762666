"""Sizes of the grid of a torch student: replicas, and processes that share one. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from mergeopd.messages import joined
from mergeopd.recipe.models import Parallel


class GridError(ValueError):
    """A grid that the processes do not form; `remedy` says which one they would."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class GridSizes:
    """`data` replicas of a model, each sharded over `shard` processes."""

    data: int
    shard: int

    @classmethod
    def of(cls, parallel: Parallel, world: int) -> GridSizes:
        """Return the grid of `world` processes; what the recipe leaves open is what remains.

        With neither size given, all processes share one model. Raises GridError.
        """
        data, shard = parallel.data, parallel.shard
        if data is None and shard is None:
            return cls(1, world)
        if data is not None and shard is not None:
            if data * shard != world:
                start = f"start {data * shard}: mergeopd run --nproc {data * shard}"
                others = [f"`{{data: {world // s}, shard: {s}}}`" for s in _nearest(shard, world)]
                message = (
                    f"data {data} x shard {shard} = {data * shard} is not the number of processes, {world}"
                )
                raise GridError(message, f"{start}, or use {joined(others, 'or')}")
            return cls(data, shard)
        key, size = ("shard", shard) if data is None else ("data", data)
        assert size is not None
        if world % size:
            start = f"start {size} or a multiple of it: mergeopd run --nproc {size}"
            others = [f"`{key}: {near}`" for near in _nearest(size, world)]
            message = f"{key} {size} does not divide the number of processes, {world}"
            raise GridError(message, f"{start}, or use {joined(others, 'or')}")
        return cls(world // size, size) if data is None else cls(size, world // size)


def _nearest(size: int, world: int) -> list[int]:
    """Return the divisors of `world` next to `size`: the next smaller one, and the next larger one."""
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    below, above = [n for n in divisors if n <= size], [n for n in divisors if n > size]
    return [*below[-1:], *above[:1]]
