"""Start vLLM and SGLang servers, watch them, restart one that crashed, and stop them by process id."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

from mergeopd.errors import ServingError, printable
from mergeopd.serving.protocol import Transfer
from mergeopd.serving.vllm import EXTENSION_FOLDER, WORKER_EXTENSION

EngineName = Literal["vllm", "sglang"]
OnWait = Callable[[float], None]

HOST = "127.0.0.1"
ENGINE_TITLE: Mapping[EngineName, str] = {"vllm": "vLLM", "sglang": "SGLang"}
MODULE: Mapping[EngineName, str] = {
    "vllm": "vllm.entrypoints.openai.api_server",
    "sglang": "sglang.launch_server",
}
_GRACE_S = 20.0
_SHOWN_LINES = 20
_SHOWN_BYTES = 16_384
_WATCH = Path(__file__).with_name("watch.py")
# torchrun sets these for the trainer, and a server would take them for its own grid.
_NOT_INHERITED = frozenset(
    {
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
        *("ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
        *("PYTHONPATH", "PYTHONHOME"),
    }
)


@dataclass(frozen=True, slots=True)
class ServerLaunch:
    """A server to start on this machine, on loopback.

    Raises:
        ServingError: the model or the Python is not there.
    """

    engine: EngineName
    model: Path
    """a folder with weights, config and tokenizer"""
    model_name: str
    """the name that requests use"""
    context_length: int
    """prompt and response together, in tokens"""
    dtype: str
    log: Path
    """the server's output is appended to this file"""
    devices: tuple[int, ...] = ()
    """the GPUs, over which the model is sharded (tensor parallelism); () runs on the CPU"""
    port: int | None = None
    """None chooses a free one"""
    python: Path = field(default_factory=lambda: Path(sys.executable))
    """the interpreter of the engine's environment"""
    script: Path | None = None
    """run instead of the engine's own module"""
    weight_transfer: Transfer | None = None
    """how new weights arrive, besides from a folder (vLLM; SGLang needs no option for it)"""
    arguments: tuple[str, ...] = ()
    """of the engine's command line; they come last, so they win"""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return ENGINE_TITLE[self.engine]

    def __post_init__(self) -> None:
        if not self.model.is_dir():
            raise ServingError(f"{self.title} cannot start: its model folder {self.model} does not exist")
        if not self.python.is_file():
            raise ServingError(
                f"{self.title} cannot start: there is no Python at {self.python}; "
                f"give the interpreter of an environment with {self.engine}"
            )

    def command(self, port: int) -> list[str]:
        """Return the command line that serves on `port`."""
        program = [str(self.script)] if self.script else ["-m", MODULE[self.engine]]
        options = _vllm_options(self) if self.engine == "vllm" else _sglang_options(self)
        shared = ["--served-model-name", self.model_name, "--host", HOST, "--port", str(port)]
        return [str(self.python), *program, *options, *shared, "--dtype", self.dtype, *self.arguments]

    def process_environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """Return the server's environment variables, given the caller's."""
        kept = {
            name: value
            for name, value in inherited.items()
            if name not in _NOT_INHERITED and not name.startswith("TORCHELASTIC_")
        }
        # Weights come from a folder; a server that asks the hub for them has the wrong name of it.
        own = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ",".join(map(str, self.devices))}
        if self.engine == "vllm":
            # Without development mode there are no routes for weights.
            own |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
        if self.weight_transfer == "ipc":
            # vLLM's handles of GPU memory are pickled; only processes of this machine reach the server.
            own |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
        if not self.devices:
            own |= {"PYTHONPATH": str(EXTENSION_FOLDER)} if self.engine == "vllm" else {}
            own |= {"OMP_NUM_THREADS": inherited.get("OMP_NUM_THREADS", "1")}
            own |= (
                {"VLLM_CPU_KVCACHE_SPACE": "1"} if self.engine == "vllm" else {"SGLANG_USE_CPU_ENGINE": "1"}
            )
        return kept | own | dict(self.environment)


def _vllm_options(launch: ServerLaunch) -> list[str]:
    options = [
        *("--model", str(launch.model), "--max-model-len", str(launch.context_length)),
        # Token ids in and out: /inference/v1/generate.
        "--enable-scale-out",
        # The behaviour policy's log-probs are those after temperature, top-k and top-p.
        *("--logprobs-mode", "processed_logprobs"),
        # Not what the folder's generation_config.json says.
        *("--generation-config", "vllm"),
        # As many log-probs per position as are asked for.
        *("--max-logprobs", "-1"),
    ]
    if not launch.devices:
        # Compiling for a CPU takes longer than a trial.
        options += ["--enforce-eager", "--worker-extension-cls", WORKER_EXTENSION]
    if len(launch.devices) > 1:
        options += ["--tensor-parallel-size", str(len(launch.devices))]
    if launch.weight_transfer:
        options += ["--weight-transfer-config", json.dumps({"backend": launch.weight_transfer})]
    return options


def _sglang_options(launch: ServerLaunch) -> list[str]:
    options = ["--model-path", str(launch.model), "--context-length", str(launch.context_length)]
    if len(launch.devices) > 1:
        options += ["--tp-size", str(len(launch.devices))]
    if not launch.devices:
        options += [
            *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
            *("--disable-overlap-schedule", "--max-total-tokens", "16384"),
            # Else its scheduler keeps a core busy, also without requests.
            "--sleep-on-idle",
        ]
    return options


def free_port() -> int:
    """Return a port of the loopback interface that nothing listens on."""
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


def check_port_is_free(port: int, title: str) -> None:
    """Raise ServingError if a program listens on a port that a server is to have."""
    try:
        # With SO_REUSEADDR, so that a server that has just been stopped does not count.
        socket.create_server((HOST, port)).close()
    except OSError as error:
        raise ServingError(
            f"{title} cannot start: port {port} of {HOST} cannot be used ({error.strerror}); "
            "stop the program that listens there, give another `port`, or leave `port` out to use a free one"
        ) from None


def is_healthy(port: int, timeout_s: float = 2.0) -> bool:
    """Return whether the server on a loopback port is ready for requests."""
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout_s)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class ServerProcess:
    """A server that this process started. `stop` it, or use it as a context manager.

    A small process beside the server (`watch.py`) ends it when this process ends, however that happens.

    Args:
        launch: what to start.
        start_timeout_s: seconds until it must be ready for requests; large models take minutes.
        on_wait: is called a few times per second while the server starts, with the seconds so far. If it
            raises, the server is stopped.
    """

    def __init__(
        self, launch: ServerLaunch, start_timeout_s: float, on_wait: OnWait = lambda _: None
    ) -> None:
        self.launch = launch
        self._start_timeout_s = start_timeout_s
        self._on_wait = on_wait
        self._may_restart = True
        self._watch: subprocess.Popen[str] | None = None
        self.pid: int | None = None
        """the process id of the server, which leads a process group"""
        self.port = launch.port if launch.port is not None else free_port()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def start(self) -> None:
        """Start the server and wait until it is ready.

        Raises:
            ServingError: the port is in use, or the server ended or was not ready in time.
        """
        check_port_is_free(self.port, self.launch.title)
        try:
            self._spawn()
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise

    def poll(self) -> int | None:
        """Return the server's exit status, None while it runs; 128 + n if signal n killed it."""
        return None if self._watch is None else self._watch.poll()

    def ensure_running(self) -> bool:
        """Restart the server if it has crashed, once; return whether it was restarted.

        A restarted server has the weights of its model folder and an empty cache.

        Raises:
            ServingError: it crashed again, or the restart failed.
        """
        status = self.poll()
        if status is None:
            return False
        if not self._may_restart:
            raise ServingError(f"{self._ended(status)} after it had been restarted\n{self._last_output()}")
        self._may_restart = False
        self.start()
        return True

    def stop(self) -> None:
        """End the server and its workers, and wait for it: SIGTERM, then SIGKILL for what is left."""
        if self._watch is None:
            return
        if self._watch.poll() is None:
            self._watch.terminate()
        try:
            self._watch.wait(2 * _GRACE_S + 5)
        except subprocess.TimeoutExpired:
            self._watch.kill()  # takes the server with it
            self._watch.wait()

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _spawn(self) -> None:
        self.launch.log.parent.mkdir(parents=True, exist_ok=True)
        command = self.launch.command(self.port)
        with self.launch.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            self._watch = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_WATCH), str(os.getpid()), str(_GRACE_S), *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self.launch.process_environment(os.environ),
                text=True,
                start_new_session=True,
            )
        assert self._watch.stdout is not None
        with self._watch.stdout as output:
            pid = output.readline()
        self.pid = int(pid) if pid else None

    def _wait_until_healthy(self) -> None:
        start = time.monotonic()
        assert self._watch is not None
        while not is_healthy(self.port):
            waited = time.monotonic() - start
            try:
                status = self._watch.wait(0.2)
            except subprocess.TimeoutExpired:
                pass
            else:
                raise ServingError(f"{self._ended(status)} while it started\n{self._last_output()}")
            if waited > self._start_timeout_s:
                raise ServingError(
                    f"{self.launch.title} was not ready after {waited:.0f} s\n{self._last_output()}"
                )
            self._on_wait(waited)

    def _ended(self, status: int) -> str:
        number = status - 128
        how = signal.Signals(number).name if number in signal.valid_signals() else f"status {status}"
        return f"{self.launch.title} on {self.url} ended with {how}"

    def _last_output(self) -> str:
        with self.launch.log.open("rb") as log:
            log.seek(max(0, self.launch.log.stat().st_size - _SHOWN_BYTES))
            lines = log.read().decode("utf-8", errors="replace").splitlines()
        shown = "\n".join(f"    {printable(line)}" for line in lines[-_SHOWN_LINES:])
        return f"The last lines of {self.launch.log}:\n{shown}"
