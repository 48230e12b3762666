"""The engine over servers: weights and versions, faults of syncs and replies, bans, stop texts, returns."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_server import FakeServer, Table

from mergeopd.errors import ServingError
from mergeopd.rollout.protocol import Completion, EngineContext, GenerationRequest
from mergeopd.rollout.served import ServedEngine
from mergeopd.rollout.servers import RunningServers
from mergeopd.serving import transport
from mergeopd.serving.sglang import SglangApi
from mergeopd.serving.vllm import VllmApi
from mergeopd.types import Sampling

VOCAB, ROWS, EOS, LENGTH = 8, 10, 0, 5
SHORT = Sampling(1.0, 1.0, LENGTH, ())
PROMPTS = [[1], [2, 3], [7], [5, 5], [4], [6, 1, 2]]


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_DOWN_S", 0.02), ("_BACKOFF_S", 0.001), ("_CONNECT_S", 1.0), ("_CLOSE_S", 0.2)):
        monkeypatch.setattr(transport, name, value)
    monkeypatch.setattr("mergeopd.rollout.served._POLL_S", 0.01)


@dataclass
class Publisher:
    """Every version has its own table."""

    folder: Path
    padding: float = -100.0  # the logit of ids behind the vocabulary
    discarded: bool = False

    def table(self, version: int) -> Table:
        table = Table(ROWS, seed=100 + version)
        table.logits[:, VOCAB:] = self.padding
        return table

    def publish(self, source: Any, version: int) -> Path:
        return self.table(version).save(self.folder / f"version-{version}")

    def discard(self) -> None:
        self.discarded = True


@dataclass
class Rig:
    """An engine over servers, most of whose methods wait for the responses."""

    servers: list[FakeServer]
    engine: ServedEngine
    publisher: Publisher
    sampling: Sampling = SHORT
    done: list[int] = field(default_factory=list)

    def sync(self, version: int) -> None:
        self.engine.sync_weights(None, version)  # type: ignore[arg-type]

    def generate(self, prompts: list[list[int]] = PROMPTS) -> list[Completion]:
        requests = [GenerationRequest(f"p:{i}", 0, np.array(p, np.int32)) for i, p in enumerate(prompts)]
        return self.engine.submit(requests, self.sampling).wait(self.done.append)

    def check(self, completions: list[Completion], version: int, prompts: list[list[int]] = PROMPTS) -> None:
        """Compare with responses of the table of a version: none is missing, doubled or of other weights."""
        table = self.publisher.table(version)
        for prompt, one in zip(prompts, completions, strict=True):
            ids, logprobs, end = table.respond(prompt, self.params(None))
            assert one.response_ids.tolist() == ids
            assert one.logprobs == pytest.approx(logprobs, abs=1e-6)
            assert one.finish == ("length" if end == "length" else "eos" if end == str(EOS) else "stop")
            assert one.policy_version == version

    def params(self, bias: dict[str, float] | None) -> dict[str, Any]:
        how = self.sampling
        return {
            "temperature": how.temperature,
            "logit_bias": bias,
            "stop": how.stop,
            "stop_token_ids": [EOS],
            "max_tokens": how.max_new_tokens,
        }


class Bytes:
    def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        raise AssertionError("servers find stop texts")


def context() -> EngineContext:
    return EngineContext((EOS,), Bytes(), torch.device("cpu"), 0, lambda r, g: g(r), lambda work: work())


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(kind: str, num: int = 1, **settings: Any) -> Rig:
        server_settings = settings.pop("server", {})
        servers = [FakeServer(Table(ROWS), kind, **server_settings) for _ in range(num)]
        publisher = Publisher(tmp_path)
        settings = {"concurrency": 3, "timeout_s": 5.0, "lost_s": 0.5, **settings}
        api = VllmApi() if kind == "vllm" else SglangApi()
        where = RunningServers([server.url for server in servers])
        engine = ServedEngine(api, where, context(), publisher, range(VOCAB, ROWS), **settings)
        rigs.append(Rig(servers, engine, publisher))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.engine.close()
        for server in rig.servers:
            server.close()


@pytest.fixture(params=["vllm", "sglang"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


LOADS = {"vllm": "/collective_rpc", "sglang": "/update_weights_from_disk"}


def test_every_version_generates_with_its_own_weights(kind: str, make: Callable[..., Rig]) -> None:
    rig = make(kind, 2)
    for version in (0, 1, 5):
        rig.sync(version)
        rig.check(rig.generate(), version)
    assert rig.engine.counts().num_lost == rig.engine.counts().num_stale == 0
    assert {server.weight_version for server in rig.servers} == {"5"}
    assert not any(server.is_paused for server in rig.servers)
    rig.engine.close()
    assert rig.publisher.discarded


@pytest.mark.parametrize("fault", ["drop", "500", "half", "half_json", "short", "shifted", "die"])
def test_faults_of_replies_lose_and_double_nothing(kind: str, fault: str, make: Callable[..., Rig]) -> None:
    rig = make(kind, 2)
    rig.sync(0)
    rig.sync(3)
    rig.servers[0].fail("ok", fault)
    rig.check(rig.generate(), 3)
    rig.servers[0].restart() if fault == "die" else None
    rig.check(rig.generate(), 3)
    assert rig.engine.counts().num_retries >= 1 + (fault == "die")


def test_ids_behind_the_vocabulary_are_generated_again_and_banned(
    kind: str, make: Callable[..., Rig]
) -> None:
    rig = make(kind)
    rig.publisher.padding = 0.0
    rig.sync(0)
    prompts = [[i % VOCAB, i // VOCAB] for i in range(48)]
    completions = rig.generate(prompts)
    assert len(completions) == 48
    assert max(int(one.response_ids.max()) for one in completions) < VOCAB
    sent = [body["sampling_params"]["logit_bias"] for body in rig.servers[0].generated()]
    assert sent[0] is None
    assert sent[-1] == {"8": -100.0, "9": -100.0}
    num_retries = rig.engine.counts().num_retries
    completions = rig.generate(prompts)
    assert rig.engine.counts().num_retries == num_retries > 0
    rig.publisher.padding = -100.0  # as if those ids had no probability
    rig.check(completions, 0, prompts)


def test_stop_texts_and_end_tokens_end_responses(kind: str, make: Callable[..., Rig]) -> None:
    rig = make(kind)
    rig.sampling = Sampling(0.7, 1.0, 30, ("w3 w", "w5"))
    rig.sync(0)
    prompts = [[i % VOCAB, i // VOCAB] for i in range(32)]
    completions = rig.generate(prompts)
    rig.check(completions, 0, prompts)
    assert {one.finish for one in completions} == {"stop", "eos"}


def test_an_older_sglang_that_ignores_the_sampling_mask_is_refused(
    make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log-probabilities would be of the distribution before truncation."""
    rig = make("sglang")
    rig.sampling = Sampling(1.0, 0.5, 4)
    rig.sync(0)
    rig.generate([[2]])
    generation = SglangApi.generation

    def without_mask(*arguments: Any, **options: Any) -> tuple[str, dict[str, Any]]:
        path, body = generation(*arguments, **options)
        return path, {key: value for key, value in body.items() if key != "return_sampling_mask"}

    monkeypatch.setattr(SglangApi, "generation", without_mask)
    with pytest.raises(ServingError, match=r"truncated distributions; update it to SGLang 0\.5\.18"):
        rig.generate([[2]])


def test_a_context_that_is_too_short_stops_at_once(make: Callable[..., Rig]) -> None:
    rig = make("vllm", server={"max_len": 4})
    rig.sync(0)
    with pytest.raises(ServingError, match=r"cut a response after 3 tokens.*rollout.max_new_tokens"):
        rig.generate([[2]])
    assert len(rig.servers[0].generated()) == 1
    other = make("sglang", server={"max_len": 4})
    other.sync(0)
    with pytest.raises(ServingError, match=r"status 400: .*context length 4"):
        other.generate([[2]])


@pytest.mark.parametrize("fault", ["500", "drop", "half_json", "die"])
def test_an_update_that_fails_is_made_when_the_server_returns(
    kind: str, fault: str, make: Callable[..., Rig]
) -> None:
    """It generates nothing in between: its weights may be new in part."""
    rig = make(kind, lost_s=5.0)
    rig.sync(0)
    server = rig.servers[0]
    server.fail(fault, path=LOADS[kind])
    rig.sync(1)
    if fault == "die":
        server.restart()
    num = len(server.requests)
    rig.check(rig.generate(), 1)
    paths = [path for path, _ in server.requests[num:]]
    assert paths.index(LOADS[kind]) < paths.index(server.generate_path)
    assert rig.engine.counts().num_lost == 1
    assert not server.is_paused


def test_an_update_that_fails_at_one_of_two_servers_leaves_the_other(
    kind: str, make: Callable[..., Rig]
) -> None:
    rig = make(kind, 2)
    rig.sync(0)
    rig.servers[0].fail(*["500"] * 99, path=LOADS[kind])
    rig.sync(1)
    rig.check(rig.generate(), 1)
    assert rig.servers[0].generated() == []


@pytest.mark.parametrize(
    ("kind", "fault", "path", "message"),
    [
        ("sglang", "refuse", LOADS["sglang"], "status 400: .*planted"),
        ("sglang", "not_done", LOADS["sglang"], "refused the weights: planted"),
        ("sglang", "old_version", LOADS["sglang"], "has weights of version '0' after an update to '1'"),
        ("vllm", "old_version", "/update_weight_version", "has weights of version '0' after an update to"),
        ("vllm", "400", LOADS["vllm"], "status 400: .*planted"),
    ],
)
def test_an_update_that_all_servers_refuse_stops_at_once(
    kind: str, fault: str, path: str, message: str, make: Callable[..., Rig]
) -> None:
    rig = make(kind, 2)
    rig.sync(0)
    for server in rig.servers:
        server.fail(fault, path=path)
    with pytest.raises(ServingError, match=message):
        rig.sync(1)
    assert not any(server.is_paused for server in rig.servers)


@pytest.mark.parametrize("fault", ["default_version", "newer_version"])
def test_responses_of_other_weights_are_dropped_counted_and_generated_again(
    kind: str, fault: str, make: Callable[..., Rig]
) -> None:
    rig = make(kind)
    rig.sync(2)
    rig.servers[0].fail("ok", fault)
    num = len(rig.servers[0].requests)
    rig.check(rig.generate(), 2)
    assert rig.engine.counts().num_stale == 1
    assert LOADS[kind] in [path for path, _ in rig.servers[0].requests[num:]]


def test_a_server_that_was_restarted_unseen_gets_the_weights_again(
    kind: str, make: Callable[..., Rig]
) -> None:
    rig = make(kind)
    rig.sync(4)
    rig.generate()
    rig.servers[0].restart(Table(ROWS, seed=1))
    rig.check(rig.generate(), 4)
    assert rig.engine.counts().num_stale + rig.engine.counts().num_lost > 0


def test_a_server_that_returns_during_an_update_gets_the_newest_weights(
    kind: str, make: Callable[..., Rig]
) -> None:
    """Without versions in replies, nothing else would show the older ones."""
    rig = make(kind, 2, server={"reports_versions": False})
    rig.sync(0)
    rig.servers[0].fail("die")
    rig.check(rig.generate(), 0)
    server = rig.servers[0]
    server.restart()
    loading, go = threading.Event(), threading.Event()
    load = server.model.load

    def slowly(folder: Path) -> None:
        loading.set()
        if folder.name == "version-0":
            go.wait(5)
        load(folder)

    server.model.load = slowly  # type: ignore[method-assign]
    while not loading.is_set():
        rig.generate()
    rig.sync(1)
    go.set()
    while len(server.generated()) < 9:
        rig.check(rig.generate(), 1)


def test_requests_in_flight_continue_with_new_weights(kind: str, make: Callable[..., Rig]) -> None:
    rig = make(kind, server={"delay_s": 0.05})
    rig.sync(0)
    requests = [GenerationRequest("p", i, np.array([i], np.int32)) for i in range(6)]
    pending = rig.engine.submit(requests, SHORT)
    while rig.servers[0].num_running < 3:
        time.sleep(0.001)
    rig.sync(1)
    versions = [one.policy_version for one in pending.wait(lambda _: None)]
    assert sorted(set(versions)) in ([0, 1], [1])
    paths = [path for path, _ in rig.servers[0].requests]
    assert ("/pause" if kind == "vllm" else "/pause_generation") in paths


def test_weights_that_are_loaded_in_part_spoil_what_runs(make: Callable[..., Rig]) -> None:
    rig = make("vllm", lost_s=5.0, server={"delay_s": 1.0})
    rig.sync(0)
    requests = [GenerationRequest("p", i, np.array([i], np.int32)) for i in range(3)]
    pending = rig.engine.submit(requests, SHORT)
    while rig.servers[0].num_running < 3:
        time.sleep(0.001)
    rig.servers[0].delay_s = 0.0  # of the repeated ones
    rig.servers[0].fail("500", path=LOADS["vllm"])
    rig.sync(1)
    rig.check(pending.wait(lambda _: None), 1, [[0], [1], [2]])
    assert rig.engine.counts().num_retries == 3


def test_a_request_to_stop_leaves_a_hanging_server_at_once(kind: str, make: Callable[..., Rig]) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    def stop(*_: int) -> None:
        raise Stop

    rig = make(kind, timeout_s=60.0)
    rig.sync(0)
    rig.servers[0].fail("hang", "hang", "hang")
    start = time.monotonic()
    requests = [GenerationRequest("p", i, np.array([i], np.int32)) for i in range(3)]
    with pytest.raises(Stop):
        rig.engine.submit(requests, SHORT).wait(stop)
    rig.engine.check_stop = stop
    rig.servers[0].fail("hang", path=LOADS[kind])
    with pytest.raises(Stop):
        rig.sync(1)
    rig.engine.close()
    assert time.monotonic() - start < 2


def test_an_unknown_answer_at_the_start_names_the_address(make: Callable[..., Rig]) -> None:
    for kind, path in (("vllm", "/v1/models"), ("sglang", "/server_info")):
        rig = make(kind)
        rig.servers[0].fail("list" if path == "/v1/models" else "html", path=path)
        if path == "/v1/models":
            rig.servers[0].settings = {"model_config": {"logprobs_mode": "raw_logprobs"}}
            with pytest.raises(ServingError, match="--logprobs-mode processed_logprobs"):
                rig.sync(0)
            continue
        with pytest.raises(ServingError, match=rf"{rig.servers[0].url}/server_info: the reply is not JSON"):
            rig.sync(0)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("vllm", {"version": "0.23.1"}, r"vLLM 0\.23\.1 is too old; update the server to 0\.24"),
        ("vllm", {"version": "dev"}, "does not tell a version of vLLM"),
        ("sglang", {"version": "0.5.8"}, r"SGLang 0\.5\.8 is too old"),
        ("vllm", {"routes": ["/version", "/openapi.json"]}, "start it with --enable-scale-out"),
        (
            "vllm",
            {"routes": ["/version", "/openapi.json", "/inference/v1/generate"]},
            "has no /pause, .*VLLM_SERVER_DEV_MODE=1",
        ),
        ("vllm", {"settings": {"device_config": {"device": "cpu"}}}, "--worker-extension-cls"),
        ("sglang", {"routes": ["/health"]}, "/server_info: status 404"),
        ("vllm", {"routes": ["/health"]}, "/version: status 404"),
    ],
)
def test_servers_that_cannot_be_used_are_refused_by_name(
    kind: str, change: dict[str, Any], message: str, make: Callable[..., Rig]
) -> None:
    rig = make(kind, server=change)
    with pytest.raises(ServingError, match=message):
        rig.sync(0)


def test_a_server_that_is_away_at_the_start_is_named_with_the_remedy(
    kind: str, make: Callable[..., Rig]
) -> None:
    rig = make(kind)
    rig.servers[0].kill()
    with pytest.raises(ServingError, match=rf"{rig.servers[0].url}/.*; start the server, then run the same"):
        rig.sync(0)
