"""Weights from memory to real servers: over Gloo to SGLang, and what vLLM's classes read of the student."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import reference_logprobs
from safetensors.torch import load_file

from mergeopd.errors import ServingError
from mergeopd.rollout.protocol import EngineContext, GenerationRequest
from mergeopd.rollout.served import ServedEngine
from mergeopd.rollout.servers import RunningServers
from mergeopd.rollout.transfer import GroupTransfer, TransferSync
from mergeopd.serving.sglang import SglangApi
from mergeopd.serving.transport import ServerPool
from mergeopd.serving.vllm import VllmApi
from mergeopd.types import Sampling

# So long that the next request would continue cached states.
PROMPT = [3, *range(50, 250)]


class Folder:
    """The weights of a model folder; `broken` gives the last tensors another shape."""

    def __init__(self, model: Path, *, is_broken: bool = False) -> None:
        self.model, self.is_broken = model, is_broken

    def folder_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        tensors = load_file(self.model / "model.safetensors")
        for number, (name, tensor) in enumerate(tensors.items()):
            is_spoilt = self.is_broken and 2 * number > len(tensors)
            yield name, torch.zeros(3, 5, 7) if is_spoilt else tensor


def engine_of(server: Any) -> ServedEngine:
    context = EngineContext([1], None, torch.device("cpu"), 0, None, lambda work: work())  # type: ignore[arg-type]
    # Several buckets, some with several tensors.
    transfer = GroupTransfer("gloo", torch.device("cpu"), bucket_bytes=100_000)
    api = SglangApi("gloo")
    sync = TransferSync(api, transfer, context.run_on_first)
    servers = RunningServers([server.url])
    return ServedEngine(api, servers, context, sync, range(352, 352), concurrency=4, timeout_s=60)


def gap(engine: ServedEngine, model: Path, version: int) -> float:
    """Largest difference between the log-probs of responses and those of a model."""
    requests = [GenerationRequest(str(n), 0, np.array(PROMPT)) for n in range(3)]
    completions = engine.submit(requests, Sampling(1.0, 1.0, 12)).wait(lambda _: None)
    assert [one.policy_version for one in completions] == [version] * 3
    expected = [reference_logprobs(model, PROMPT, one.response_ids.tolist()) for one in completions]
    return max(
        float(np.abs(one.logprobs - reference).max())
        for one, reference in zip(completions, expected, strict=True)
    )


def test_sglang_generates_with_weights_from_memory_also_after_a_restart_and_a_broken_transfer(
    start_server: Any, engine_model: Any
) -> None:
    server = start_server("sglang", engine_model(0))
    engine = engine_of(server)
    try:
        for version, seed in enumerate([1, 0, 1]):
            engine.sync_weights(Folder(engine_model(seed)), version)  # type: ignore[arg-type]
            assert gap(engine, engine_model(seed), version) < 1e-4
            assert gap(engine, engine_model(1 - seed), version) > 0.1
        with pytest.raises(
            ServingError, match=r"(?s)discard the whole weights.*No server has the weights of version 3"
        ):
            engine.sync_weights(Folder(engine_model(0), is_broken=True), 3)  # type: ignore[arg-type]
        engine.sync_weights(Folder(engine_model(0)), 4)  # type: ignore[arg-type]
        assert gap(engine, engine_model(0), 4) < 1e-4
        server.process.stop()
        server.process.start()
        engine.sync_weights(Folder(engine_model(1)), 5)  # type: ignore[arg-type]
        assert gap(engine, engine_model(1), 5) < 1e-4
        engine.sync_weights(Folder(engine_model(0)), 6)  # type: ignore[arg-type]
    finally:
        engine.close()


# Runs in vLLM's environment: reads a folder through `StudentWeights` as vLLM's NCCL sender does, without NCCL.
READ = """
import json, sys
import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine
from mergeopd.rollout.vllm_transfer import StudentWeights, TensorFacts, VllmTransfer
tensors = load_file(sys.argv[1])
facts = [TensorFacts(name, one.dtype, tuple(one.shape)) for name, one in tensors.items()]
source = StudentWeights(facts, torch.device("cpu"), ParamMeta)
WeightSource.register(StudentWeights)
assert isinstance(source, WeightSource)
read = NCCLTrainerWeightTransferEngine._checked_iter
for _ in range(2):
    source.tensors = iter(tensors.items())
    pairs = list(read(source, source.metadata()))
    assert [name for name, _ in pairs] == list(tensors)
    assert all(torch.equal(one, tensors[name]) for name, one in pairs)
source.tensors = reversed(tensors.items())
try:
    list(read(source, source.metadata()))
    print("not checked")
except ValueError as error:
    print(str(error)[:47])
"""


def test_vllms_sender_reads_the_students_weights(start_server: Any, engine_model: Any) -> None:
    python = start_server.environments / "vllm" / "bin" / "python"
    weights = str(engine_model(0) / "model.safetensors")
    result = subprocess.run(
        [python, "-c", READ, weights], text=True, capture_output=True, env={"PYTHONPATH": sys.path[0]}
    )
    assert result.stdout.splitlines()[-1:] == ["WeightSource metadata() disagrees with iteratio"], (
        result.stderr
    )


def test_vllm_without_the_option_for_transfers_is_refused_by_its_name(
    start_server: Any, engine_model: Any
) -> None:
    server = start_server("vllm", engine_model(0))
    pool = ServerPool([server.url])
    try:
        with pytest.raises(ServingError, match="start it with --weight-transfer-config '") as refusal:
            pool.run(VllmApi(transfer="nccl").facts(pool, pool.servers[0]))
        written = str(refusal.value).split("--weight-transfer-config ")[1].strip("'")
        assert json.loads(written) == {"backend": "nccl"}
    finally:
        pool.close()
