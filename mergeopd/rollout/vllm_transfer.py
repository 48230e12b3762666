"""Send weights to vLLM from GPU memory, with vLLM's own classes for trainers.

Nothing here has been run on a GPU. `StudentWeights` is tested against the classes of vLLM 0.32 that read it,
and the order of calls against a stand-in for them. Source: vLLM's `distributed/weight_transfer`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from mergeopd.errors import ServingError
from mergeopd.rollout.protocol import WeightStream
from mergeopd.rollout.transfer import Tensors, WeightTransfer, alongside, listener_towards
from mergeopd.serving.protocol import command
from mergeopd.serving.transport import Server, ServerPool

_PACKAGE = "vllm.distributed.weight_transfer"
# vLLM packs tensors into buffers of at least this size: two on each side for NCCL, one for shared memory.
BUFFER_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """Name, dtype and shape of a tensor that is sent."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass
class StudentWeights:
    """What vLLM calls a weight source: facts of all tensors, and iterations over the tensors themselves.

    `make_facts` is vLLM's class of facts. Every iteration returns the tensors that were set for it last.
    """

    facts: list[TensorFacts]
    device: torch.device
    make_facts: Callable[[str, torch.dtype, tuple[int, ...]], Any]
    tensors: Tensors = field(default_factory=lambda: iter(()))

    def metadata(self) -> list[Any]:
        return [self.make_facts(one.name, one.dtype, one.shape) for one in self.facts]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.tensors:
            yield name, tensor.detach().to(self.device)


@dataclass
class VllmTransfer(WeightTransfer):
    """Sends weights to vLLM over NCCL, or through memory of a GPU that both sides use (`ipc`).

    There is a group with each server. `device` is the GPU of the first process.
    """

    backend: Literal["nccl", "ipc"]
    device: torch.device
    _facts: list[TensorFacts] | None = field(default=None, init=False)
    _engines: dict[Server, tuple[Any, StudentWeights]] = field(default_factory=dict, init=False)

    def learn(self, source: WeightStream) -> None:
        if self._facts is None:
            self._facts = [
                TensorFacts(name, tensor.dtype, tuple(tensor.shape))
                for name, tensor in source.folder_weights()
            ]

    def send(self, pool: ServerPool, server: Server, tensors: Tensors, version: str) -> None:
        if server not in self._engines:
            connect = partial(self._connect, pool, server)
            self._engines[server] = alongside(None, connect, server, pool.timeout_s, self.device)
        engine, weights = self._engines[server]
        weights.tensors = tensors
        alongside(None, engine.send_weights, server, 2 * pool.timeout_s, self.device)

    def forget(self, server: Server) -> None:
        # Without `shutdown`, which waits for the other side of a broadcast that broke off.
        self._engines.pop(server, None)

    def _connect(self, pool: ServerPool, server: Server) -> tuple[Any, StudentWeights]:
        base, clients = _module("base"), _module("clients")
        assert self._facts is not None
        weights = StudentWeights(self._facts, self.device, base.ParamMeta)
        base.WeightSource.register(StudentWeights)
        client = clients.HTTPVLLMWeightSyncClient(server.url, timeout=pool.timeout_s)

        def post(path: str, json: dict[str, Any] | None = None) -> None:
            """Send a request through the pool: with the servers' key, and their texts in errors."""
            pool.run(command(pool, server, f"/{path}", json or {}))

        client._post = post
        factory = _module("factory").WeightTransferTrainerFactory
        engine = factory.trainer_init(self._init_info(server), client=client, source=weights)
        return engine, weights

    def _init_info(self, server: Server) -> Any:
        assert self._facts is not None
        # Shared memory must have room for the largest tensor.
        size = max([BUFFER_BYTES, *(math.prod(one.shape) * one.dtype.itemsize for one in self._facts)])
        shared = {"rank": 0, "packed": True, "packed_buffer_size_bytes": size}
        if self.backend == "ipc":
            return _module("ipc_engine").IPCTrainerInitInfo(**shared)
        with listener_towards(server.url) as free:
            host, port = free.getsockname()[:2]
        return _module("nccl_engine").NCCLTrainerInitInfo(
            master_address=host, master_port=port, world_size=1 + server.facts.num_workers, **shared
        )


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"{_PACKAGE}.{name}")
    except ImportError as error:
        raise ServingError(
            f"{_PACKAGE}.{name} cannot be imported here ({error}); install vLLM 0.32 or newer in this "
            "environment, too, or write `sync: {method: folder}`"
        ) from error
