"""Weights from memory: which servers have them after transfers that succeed, break off, or meet a restart."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, TCPStore

from mergeopd.errors import ServingError
from mergeopd.rollout import vllm_transfer
from mergeopd.rollout.protocol import EngineContext, GenerationRequest
from mergeopd.rollout.served import ServedEngine
from mergeopd.rollout.servers import RunningServers
from mergeopd.rollout.transfer import GroupTransfer, TransferSync
from mergeopd.rollout.vllm_transfer import VllmTransfer
from mergeopd.serving.sglang import SglangApi
from mergeopd.serving.transport import ServerPool
from mergeopd.serving.vllm import VllmApi
from mergeopd.types import Sampling

Reply = tuple[int, Any]


class Source:
    """Tensors that differ between versions; counts iterations and their tensors."""

    def __init__(self) -> None:
        self.version = 0.0
        self.passes: list[int] = []

    def folder_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.passes.append(0)
        for index, (name, tensor) in enumerate(self.tensors().items(), start=1):
            yield name, tensor
            self.passes[-1] = index

    def tensors(self) -> dict[str, torch.Tensor]:
        shapes = {"embedding": (7, 3), "norm": (3,), "head": (3, 5)}
        tensors = {
            name: torch.arange(3.0 * 7).repeat(5)[: torch.Size(s).numel()] for name, s in shapes.items()
        }
        found = {name: (tensors[name] + self.version).reshape(shapes[name]) for name in shapes}
        return {**found, "head": found["head"].T.to(torch.bfloat16)}  # not contiguous


@dataclass
class FakeServer:
    """The routes of an engine for weights. `fault` is a route that refuses, once its number of calls is due."""

    version: str = "default"
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    calls: list[tuple[str, Any]] = field(default_factory=list)
    fault: tuple[str, int] | None = None
    groups: dict[str, ProcessGroupGloo] = field(default_factory=dict)
    has_session: bool = False

    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]

    def restart(self) -> None:
        self.version, self.weights, self.groups, self.has_session = "default", {}, {}, False

    def reply(self, path: str, body: Any) -> Reply:
        self.calls.append((path, body))
        if self.fault and path == self.fault[0]:
            self.fault = (path, self.fault[1] - 1)
            if self.fault[1] == 0:
                self.fault = None
                return 400, {"success": False, "message": "no room"}
        route = getattr(self, path[1:].split("?")[0].replace("/", "_").replace(".", "_"), None)
        found = {"success": True} if route is None else route(body)
        return (200 if found.get("success", True) else 400), found

    def openapi_json(self, _: Any) -> Any:
        names = [
            *("begin_weight_update", "inference/v1/generate", "pause", "resume", "collective_rpc"),
            *("reset_prefix_cache", "init_weight_transfer_engine", "start_weight_update", "update_weights"),
            *(
                "finish_weight_update",
                "get_world_size",
                "weight_info",
                "update_weight_version",
                "server_info",
            ),
        ]
        return {"paths": {f"/{name}": {} for name in names}}

    def server_info(self, _: Any) -> Any:
        vllm = {
            "model_config": {"logprobs_mode": "processed_logprobs"},
            "weight_transfer_config": {"backend": "nccl"},
        }
        return {"version": "0.5.23", "tp_size": 1, "pp_size": 1, "dp_size": 1, "vllm_config": vllm}

    def v1_models(self, _: Any) -> Any:
        return {"data": [{}]}

    def model_info(self, _: Any) -> Any:
        return {"weight_version": self.version}

    def begin_weight_update(self, _: Any) -> Any:
        opened, self.has_session = not self.has_session, True
        return {"success": opened, "message": "a session is already open"}

    def end_weight_update(self, _: Any) -> Any:
        closed, self.has_session = self.has_session, False
        return {"success": closed, "message": "no session is open"}

    def init_weights_update_group(self, body: Any) -> Any:
        name, size = body["group_name"], body["world_size"]
        store: Any = TCPStore(body["master_address"], body["master_port"], size, False, timedelta(seconds=20))
        # The prefixes that torch gives a group of this name.
        for prefix in (name, f"{name}/", "cpu/"):
            store = PrefixStore(prefix, store)
        self.groups[name] = ProcessGroupGloo(store, body["rank_offset"], size, timedelta(seconds=20))
        return {"success": True}

    def update_weights_from_distributed(self, body: Any) -> Any:
        group = self.groups.get(body["group_name"])
        if group is None or not self.has_session:
            return {"success": False, "message": "no such group"}
        for name, dtype, shape in zip(body["names"], body["dtypes"], body["shapes"], strict=True):
            self.weights[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            group.broadcast([self.weights[name]], _from_first()).wait()
        self.version = body["weight_version"] or self.version
        return {"success": True}

    def generate(self, _: Any) -> Any:
        """A response of two tokens, of which 1 is the end token."""
        entries = [[-0.5, 2, None], [-0.5, 1, None]]
        facts = {"finish_reason": {"type": "stop", "matched": 1}, "output_token_logprobs": entries}
        return {"output_ids": [2, 1], "meta_info": {**facts, "weight_version": self.version}}

    # vLLM

    def get_world_size(self, _: Any) -> Any:
        return {"world_size": 4}

    def weight_info(self, _: Any) -> Any:
        return {"weight_version": self.version}

    def update_weight_version(self, body: Any) -> Any:
        self.version = body["new_version"]
        return {}


def _from_first() -> Any:
    options = torch._C._distributed_c10d.BroadcastOptions()
    options.rootRank = 0
    return options


@contextmanager
def serving(*fakes: FakeServer) -> Iterator[ServerPool]:
    """Pool of HTTP servers with these fakes behind them."""

    def handler(fake: FakeServer) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(None)

            def do_POST(self) -> None:
                self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def reply(self, body: Any) -> None:
                status, found = (200, {"version": "0.32.0"}) if self.path == "/version" else (0, None)
                if not status:
                    status, found = fake.reply(self.path, body)
                content = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler(fake)) for fake in fakes]
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    pool = ServerPool([f"http://127.0.0.1:{server.server_port}" for server in servers], timeout_s=20)
    try:
        yield pool
    finally:
        pool.close()
        for server in servers:
            server.shutdown()
            server.server_close()


def has(fake: FakeServer, source: Source, version: int) -> bool:
    expected = source.tensors()
    return fake.version == str(version) and all(
        torch.equal(fake.weights[name], tensor) for name, tensor in expected.items()
    )


def syncing(sync: TransferSync, source: Source, pool: ServerPool) -> Callable[[int], None]:
    def to(version: int) -> None:
        source.version = float(version)
        sync.sync(source, version, lambda: pool)

    return to


def test_every_server_that_gets_requests_has_all_tensors_of_the_version() -> None:
    one, two, source = FakeServer(), FakeServer(), Source()
    transfer = GroupTransfer("gloo", torch.device("cpu"), bucket_bytes=90)  # two buckets
    with serving(one, two) as pool:
        sync = TransferSync(SglangApi("gloo"), transfer, lambda work: work())
        to = syncing(sync, source, pool)
        to(1)
        assert has(one, source, 1)
        assert has(two, source, 1)
        commands = [path for path, body in one.calls if body is not None]
        update = ["/begin_weight_update", *["/update_weights_from_distributed"] * 2, "/end_weight_update"]
        first = ["/pause_generation", "/end_weight_update", "/init_weights_update_group", *update]
        assert commands == [*first, "/continue_generation"]
        buckets = [body for path, body in one.calls if path == "/update_weights_from_distributed"]
        assert [(body["flush_cache"], body["weight_version"]) for body in buckets] == [
            (False, None),
            (True, "1"),
        ]

        two.fault = ("/update_weights_from_distributed", 2)  # after the first bucket
        to(2)
        assert has(one, source, 2)
        assert [server.is_ready for server in pool.servers] == [True, False]
        assert [server.num_failed_loads > 0 for server in pool.servers] == [False, True]
        two.version = "2"  # whatever it says
        with pytest.raises(ServingError, match="gets weights at the next sync"):
            pool.run(sync.check(pool, pool.servers[1]))
        pool.run(sync.check(pool, pool.servers[0]))
        two.has_session = True  # the session that broke off

        to(3)
        assert has(two, source, 3)
        assert pool.servers[1].is_ready
        pool.run(sync.check(pool, pool.servers[1]))

        one.restart()
        with pytest.raises(ServingError, match="was started again"):
            pool.run(sync.check(pool, pool.servers[0]))
        to(4)
        assert has(one, source, 4)
        assert [fake.paths().count("/init_weights_update_group") for fake in (one, two)] == [2, 2]

        one.fault, two.fault = ("/begin_weight_update", 1), ("/end_weight_update", 1)
        with pytest.raises(
            ServingError, match=r"(?s)no room.*No server has the weights of version 5.*resume"
        ):
            to(5)
        sync.discard()


def test_other_processes_iterate_as_often_as_the_first_also_when_a_transfer_breaks_off() -> None:
    told: list[Any] = []
    fakes = [FakeServer(), FakeServer(fault=("/init_weights_update_group", 1))]

    def first(work: Callable[[], Any]) -> Any:
        told.append(work())
        return told[-1]

    def no_pool() -> ServerPool:
        raise AssertionError("only the first process talks to servers")

    sources = [Source(), Source()]
    transfer = GroupTransfer("gloo", torch.device("cpu"))
    with serving(*fakes) as pool:
        sync = TransferSync(SglangApi("gloo"), transfer, first)
        sync.sync(sources[0], 1, lambda: pool)
        sync.discard()
    replies = iter(told)
    other = TransferSync(SglangApi("gloo"), transfer, lambda work: next(replies))
    other.sync(sources[1], 1, no_pool)
    assert sources[0].passes == sources[1].passes == [3, 3]


def test_the_only_server_gets_the_weights_again_while_responses_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mergeopd.serving.transport._DOWN_S", 0.05)
    fake, source = FakeServer(), Source()
    context = EngineContext([1], None, torch.device("cpu"), 0, None, lambda work: work())  # type: ignore[arg-type]
    transfer = GroupTransfer("gloo", torch.device("cpu"))
    sync = TransferSync(SglangApi("gloo"), transfer, context.run_on_first, is_current=True)
    with serving(fake) as pool:
        servers = RunningServers([pool.servers[0].url])
        engine = ServedEngine(
            SglangApi("gloo"), servers, context, sync, range(9, 9), concurrency=2, timeout_s=20
        )
        engine.sync_weights(source, 1)  # type: ignore[arg-type]
        fake.restart()
        requests = [GenerationRequest(str(n), 0, np.array([3, 4])) for n in range(3)]
        completions = engine.submit(requests, Sampling(1.0, 1.0, 8)).wait(lambda _: None)
        assert [one.policy_version for one in completions] == [1] * 3
        assert has(fake, source, 1)
        assert engine.counts().num_lost == 1
        engine.close()


class Trainer:
    """Stands in for vLLM's sender: the calls that it makes, and what it reads."""

    made: list[Trainer] = []  # noqa: RUF012

    def __init__(self, info: Any, client: Any, source: Any) -> None:
        self.info, self.client, self.source = info, client, source
        self.read: dict[str, torch.Tensor] = {}
        Trainer.made.append(self)
        client._post("init_weight_transfer_engine", {"init_info": {"world_size": info.world_size}})

    def send_weights(self) -> None:
        metadata = self.source.metadata()
        self.client._post("start_weight_update")
        self.client._post("update_weights", {"update_info": {"names": [one.name for one in metadata]}})
        self.read = dict(self.source)
        facts = [(name, one.dtype, tuple(one.shape)) for name, one in self.read.items()]
        assert facts == [(one.name, one.dtype, one.shape) for one in metadata]
        self.client._post("finish_weight_update", {"weight_version": None})


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> type[Trainer]:
    class Base:
        ParamMeta = staticmethod(
            lambda name, dtype, shape: SimpleNamespace(name=name, dtype=dtype, shape=shape)
        )
        WeightSource = SimpleNamespace(register=lambda kind: None)

    modules = {
        "base": Base,
        "clients": SimpleNamespace(HTTPVLLMWeightSyncClient=lambda url, timeout: SimpleNamespace()),
        "nccl_engine": SimpleNamespace(NCCLTrainerInitInfo=SimpleNamespace),
        "factory": SimpleNamespace(
            WeightTransferTrainerFactory=SimpleNamespace(
                trainer_init=lambda info, client, source: Trainer(info, client, source)
            )
        ),
    }
    monkeypatch.setattr(vllm_transfer, "_module", modules.__getitem__)
    monkeypatch.setattr(Trainer, "made", [])
    return Trainer


def test_vllms_classes_send_what_the_student_has_between_pause_and_resume(trainer: type[Trainer]) -> None:
    fake, source = FakeServer(), Source()
    with serving(fake) as pool:
        transfer = VllmTransfer("nccl", torch.device("cpu"))
        to = syncing(TransferSync(VllmApi(transfer="nccl"), transfer, lambda work: work()), source, pool)
        for version in (1, 2):
            fake.calls.clear()
            to(version)
            assert fake.version == str(version)
            (engine,) = trainer.made
            assert all(torch.equal(engine.read[name], one) for name, one in source.tensors().items())
        commands = [path for path, body in fake.calls if body is not None]
        transferred = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
        ends = ["/reset_prefix_cache?reset_running_requests=true", "/update_weight_version", "/resume"]
        assert commands == ["/pause?mode=keep", *transferred, *ends]
        assert (engine.info.rank, engine.info.world_size, engine.info.packed) == (0, 5, True)
        assert source.passes == [3, 3, 3]  # the first only for their facts

        fake.fault = ("/update_weights", 1)
        with pytest.raises(ServingError, match=r"(?s)/update_weights: status 400.*No server has"):
            to(3)
        assert fake.paths()[-1] == "/resume"
        to(4)
        assert fake.version == "4"
        assert len(trainer.made) == 2


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(ServingError, match=r"install vLLM 0\.32 or newer in this environment"):
        vllm_transfer._module("no_such_part")
