"""The pool of connections: what is repeated and where, what stops, bounds, servers that go and return."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from fake_server import FakeServer, Table

from mergeopd.errors import ServingError
from mergeopd.serving import transport
from mergeopd.serving.sglang import SglangApi
from mergeopd.serving.transport import Server, ServerPool
from mergeopd.serving.vllm import VllmApi
from mergeopd.types import Sampling

APIS = {"vllm": VllmApi(), "sglang": SglangApi()}
SHORT = Sampling(1.0, 1.0, 4, ())


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_DOWN_S", 0.02), ("_BACKOFF_S", 0.001), ("_CONNECT_S", 1.0), ("_CLOSE_S", 0.2)):
        monkeypatch.setattr(transport, name, value)


@pytest.fixture(params=["vllm", "sglang"])
def server(request: pytest.FixtureRequest) -> Iterator[FakeServer]:
    server = FakeServer(Table(), request.param)
    yield server
    server.close()


@pytest.fixture
def make_pool() -> Iterator[Callable[..., ServerPool]]:
    pools: list[ServerPool] = []

    def make(*servers: FakeServer, **settings: Any) -> ServerPool:
        settings = {"timeout_s": 5.0, "lost_s": 0.3, **settings}
        pools.append(ServerPool([server.url for server in servers], **settings))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def ask(pool: ServerPool, server: FakeServer, *prompts: list[int], eos: tuple[int, ...] = (0,)) -> list[Any]:
    """Generate a response to each prompt, all at once."""
    api = APIS[server.engine]

    async def one(ids: list[int]) -> Any:
        path, body = api.generation(ids, SHORT, eos, ())
        return await pool.request(path, body, lambda reply: api.generated(reply, SHORT, eos))

    async def every() -> list[Any]:
        return await asyncio.gather(*map(one, prompts))

    return pool.run(every())


def expected(server: FakeServer, ids: list[int]) -> tuple[list[int], list[float]]:
    key = "max_tokens" if server.engine == "vllm" else "max_new_tokens"
    params = {"temperature": 1.0, "logit_bias": None, "stop": (), "stop_token_ids": [0], key: 4}
    response, logprobs, _ = server.model.respond(ids, params)
    return response, logprobs


FAULTS = ("drop", "500", "503", "half", "half_json", "html", "short", "shifted", "null", "positive", "empty")
FAULTS += ("list", "odd", "abort", "429", "429:0")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_request_is_repeated_and_its_reply_used_once(
    server: FakeServer, make_pool: Callable[..., ServerPool], fault: str
) -> None:
    pool = make_pool(server)
    server.fail(fault, "ok", fault)
    results = ask(pool, server, [1, 2], [3], [4, 5, 6])
    for prompt, result in zip(([1, 2], [3], [4, 5, 6]), results, strict=True):
        assert (result.ids, result.logprobs) == expected(server, prompt)
    assert len(server.generated()) == 5
    assert pool.num_retries == 2
    assert (pool.servers[0].num_lost > 0) == (fault in ("drop", "half"))


@pytest.mark.parametrize("fault", ["500", "short", "drop"])
def test_a_request_that_always_fails_ends_with_its_cause(
    server: FakeServer, make_pool: Callable[..., ServerPool], fault: str
) -> None:
    server.fail(*[fault] * 9)
    cause = {"500": "status 500", "short": r"3 log-probabilities for 4 tokens", "drop": "disconnected"}[fault]
    with pytest.raises(ServingError, match=f"failed 5 times, at last: .*{cause}.*server's log"):
        ask(make_pool(server), server, [2, 2])
    assert len(server.generated()) == 5


def test_a_refused_request_is_not_repeated(server: FakeServer, make_pool: Callable[..., ServerPool]) -> None:
    server.fail("400")
    with pytest.raises(ServingError, match=r"status 400: .*planted"):
        ask(make_pool(server), server, [1])
    assert len(server.generated()) == 1


def test_a_busy_server_is_asked_until_it_has_time(
    server: FakeServer, make_pool: Callable[..., ServerPool]
) -> None:
    server.fail(*["429"] * 7, "429:0")
    assert ask(make_pool(server), server, [1])[0].ids == expected(server, [1])[0]
    assert not [path for path, _ in server.requests if path == "/health"]
    server.fail(*["429"] * 99)
    with pytest.raises(ServingError, match="status 429"):
        ask(make_pool(server, timeout_s=0.01), server, [1])


def test_a_server_says_when_to_ask_again(
    server: FakeServer, make_pool: Callable[..., ServerPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    sleep = asyncio.sleep

    async def asleep(seconds: float) -> None:
        waited.append(seconds)
        await sleep(0)

    pool = make_pool(server)
    server.fail("429:7", "503:2", "429:99999")
    monkeypatch.setattr(transport.asyncio, "sleep", asleep)
    ask(pool, server, [1])
    assert waited == [7.0, 2.0, 120.0]


def test_a_hanging_server_ends_the_run_after_the_time_out(
    server: FakeServer, make_pool: Callable[..., ServerPool]
) -> None:
    pool = make_pool(server, timeout_s=0.05, lost_s=0.1)
    server.fail("hang")
    server.fail(*["hang"] * 99, path="/health")
    start = time.monotonic()
    with pytest.raises(ServingError, match=r"ReadTimeout\): not available for 0 seconds; start the server"):
        ask(pool, server, [1])
    assert time.monotonic() - start < 3


def test_a_slow_response_is_asked_for_again_from_a_healthy_server(
    server: FakeServer, make_pool: Callable[..., ServerPool]
) -> None:
    pool = make_pool(server, timeout_s=0.2)
    server.fail("hang")
    assert ask(pool, server, [1])[0].ids == expected(server, [1])[0]
    assert pool.servers[0].num_lost == 0


def test_the_other_server_takes_over_and_the_returned_one_is_prepared_before_any_request(
    server: FakeServer, make_pool: Callable[..., ServerPool]
) -> None:
    other = FakeServer(Table(), server.engine, delay_s=0.005)
    pool = make_pool(server, other, max_running=2)
    prepared: list[int] = []

    async def prepare(one: Server) -> None:
        prepared.append(len(server.generated()))

    pool.on_return = prepare
    server.fail("die")
    prompts = [[1, i % 7 + 1, i // 7 + 1] for i in range(20)]
    results = ask(pool, server, *prompts)
    assert [r.ids for r in results] == [expected(server, p)[0] for p in prompts]
    assert prepared == []
    num = len(server.generated())
    server.start()
    for _ in range(99):
        ask(pool, server, *prompts[:4])
        if len(server.generated()) > num:
            break
    assert prepared == [num]
    assert pool.servers[0].num_lost == 1
    other.close()


def test_a_server_that_fails_fast_does_not_take_all_requests(
    server: FakeServer, make_pool: Callable[..., ServerPool]
) -> None:
    """As one whose engine has died: it is idle, and so has the fewest running requests."""
    other = FakeServer(Table(), server.engine, delay_s=0.01)
    pool = make_pool(server, other, max_running=4)
    server.fail(*["500"] * 999)
    assert len(ask(pool, server, *([i % 8] for i in range(40)))) == 40
    assert pool.servers[0].num_lost == 0  # its /health is fine
    server.fail(*["503"] * 999, path="/health")
    ask(pool, server, *([i % 8] for i in range(10)))
    assert pool.servers[0].num_lost == 1
    other.close()


def test_all_lost_stops_and_names_each(server: FakeServer, make_pool: Callable[..., ServerPool]) -> None:
    other = FakeServer(Table(), server.engine)
    pool = make_pool(server, other)
    server.kill()
    other.kill()
    with pytest.raises(ServingError, match=rf"{server.url} \(.+\), {other.url} \(.+\): not available"):
        ask(pool, server, [1], [2])
    server.start()
    assert ask(pool, server, [1])[0].ids == expected(server, [1])[0]
    other.close()


def test_a_server_whose_preparation_fails_stays_away(
    server: FakeServer, make_pool: Callable[..., ServerPool]
) -> None:
    pool = make_pool(server, lost_s=5.0)
    attempts: list[float] = []

    async def prepare(one: Server) -> None:
        attempts.append(time.monotonic())
        if len(attempts) < 3:
            raise KeyError("not a ServingError either")

    pool.on_return = prepare
    server.fail("drop")
    assert ask(pool, server, [1])[0].ids == expected(server, [1])[0]
    assert len(attempts) == 3
    assert min(b - a for a, b in pairwise(attempts)) >= 0.02


def test_requests_are_bounded_balanced_and_reuse_connections(
    server: FakeServer, make_pool: Callable[..., ServerPool]
) -> None:
    server.delay_s = 0.002
    other = FakeServer(Table(), server.engine, delay_s=0.002)
    pool = make_pool(server, other, max_running=3)
    for _ in range(3):
        ask(pool, server, *([i % 8] for i in range(30)))
    assert server.max_running == other.max_running == 3
    assert min(len(server.generated()), len(other.generated())) > 10
    assert max(server.num_connections, other.num_connections) <= 4
    other.close()


@pytest.mark.parametrize("is_hanging", [False, True])
def test_closing_ends_running_requests(server: FakeServer, is_hanging: bool) -> None:
    pool = ServerPool([server.url])
    server.fail("hang" if is_hanging else "ok")
    path, body = APIS[server.engine].generation([1], SHORT, (0,), ())
    running = pool.submit(pool.request(path, body, lambda reply: reply))
    if is_hanging:
        while not server.generated():
            time.sleep(0.001)
    else:
        running.result()
    pool.close()
    pool.close()
    assert running.done()
