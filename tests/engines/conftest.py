"""Real vLLM and SGLang servers with tiny models, on loopback: `make test-engines` runs these tests alone.

It names the folder of the engines' environments in MERGEOPD_ENGINES; without it the tests are skipped. At most one
server of each engine runs at a time, started when the first test asks for it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from engine_models import CONTEXT_LENGTH, write_engine_model
from engine_rollouts import make_engine

from mergeopd.serving.launch import HOST, EngineName, ServerLaunch, ServerProcess

TOOLS = Path(__file__).parents[2] / "tools" / "engines"
START_TIMEOUT_S = 300.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("engines")


@dataclass(frozen=True)
class EngineServer:
    """A running server of the model `model`."""

    engine: EngineName
    model: Path
    process: ServerProcess

    @property
    def url(self) -> str:
        return self.process.url

    def call(self, path: str, body: object = None) -> Any:
        """Return the JSON reply of a GET request, or of a POST request with a body."""
        connection = HTTPConnection(HOST, self.process.port, timeout=60)
        content = None if body is None else json.dumps(body)
        connection.request(
            "GET" if body is None else "POST", path, content, {"Content-Type": "application/json"}
        )
        reply = connection.getresponse()
        text = reply.read().decode()
        connection.close()
        assert reply.status == 200, text
        return json.loads(text)


class EngineServers:
    """Start servers on demand, one of each engine at a time: other options replace the running server."""

    def __init__(self, environments: Path, logs: Path) -> None:
        self.environments = environments
        self._logs = logs
        self._running: dict[EngineName, tuple[object, EngineServer]] = {}

    def __call__(
        self,
        engine: EngineName,
        model: Path,
        arguments: tuple[str, ...] = (),
        script: str | None = None,
        environment: Mapping[str, str] = {},
    ) -> EngineServer:
        """Return a server of `model` under the name `student`. Tests that change its weights restore them.

        Args:
            arguments: of the engine's command line.
            script: a launcher in tools/engines; default: the engine's usual one.
        """
        key = (model, arguments, script, tuple(environment.items()))
        if engine in self._running:
            running, server = self._running[engine]
            if running == key and server.process.poll() is None:
                return server
            server.process.stop()
        script = script or ("sglang_server.py" if engine == "sglang" else None)
        # Its compilation would take longer than all tests together.
        usual = ("--enforce-eager",) if engine == "vllm" else ()
        launch = ServerLaunch(
            engine,
            model,
            "student",
            CONTEXT_LENGTH,
            "float32",
            self._logs / f"{engine}.log",
            python=self.environments / engine / "bin" / "python",
            script=TOOLS / script if script else None,
            arguments=usual + arguments,
            environment=environment,
        )
        process = ServerProcess(launch, START_TIMEOUT_S)
        process.start()
        self._running[engine] = (key, EngineServer(engine, model, process))
        return self._running[engine][1]

    def stop(self) -> None:
        for _, server in self._running.values():
            server.process.stop()


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServers]:
    """Function that starts a server, or returns the one that runs with the same options."""
    environments = os.environ.get("MERGEOPD_ENGINES")
    if not environments:
        pytest.skip("needs the engines' environments: `make test-engines` builds them and runs these tests")
    servers = EngineServers(Path(environments), tmp_path_factory.mktemp("logs"))
    yield servers
    servers.stop()


@pytest.fixture(scope="session")
def engine_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Function that returns the folder of a tiny model by its seed; all have the same tokenizer."""
    folder = tmp_path_factory.mktemp("models")

    def model(seed: int) -> Path:
        path = folder / f"seed_{seed}"
        return path if path.exists() else write_engine_model(path, seed)

    return model


@pytest.fixture(scope="session", params=["vllm", "sglang"])
def server(
    request: pytest.FixtureRequest, start_server: EngineServers, engine_model: Callable[[int], Path]
) -> EngineServer:
    """A server of each engine with the options of a rollout engine, and the model with seed 0."""
    return start_server(request.param, engine_model(0))


@pytest.fixture
def restored(server: EngineServer) -> Iterator[None]:
    """Afterwards the server has its first weights again."""
    yield
    engine = make_engine(server, server.url)
    engine.sync_weights(None, 99)  # type: ignore[arg-type]
    engine.close()
