"""Starting, watching and stopping a server; the server is a script of the standard library."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergeopd.errors import ServingError
from mergeopd.rollout.servers import LaunchedServers
from mergeopd.serving.launch import ServerLaunch, ServerProcess, check_port_is_free, free_port, is_healthy

SERVER = """
import http.server, os, signal, subprocess, sys, time
options = dict(zip(sys.argv, sys.argv[1:]))
mode = os.environ.get("FAKE_SERVER", "")
print("hello from", options["--served-model-name"], flush=True)
if mode == "fail":
    print("ValueError: no such\\x1b[31m kernel", file=sys.stderr)
    sys.exit(3)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("worker", worker.pid, flush=True)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
ready = mode != "loading"
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if ready else 503)
        self.end_headers()
    def log_message(self, *arguments):
        pass
http.server.HTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()
"""
TRAINER = """
import json, sys
from dataclasses import replace
from pathlib import Path
from mergeopd.serving.launch import ServerLaunch, ServerProcess
script, model, log = map(Path, sys.argv[1:])
server = ServerProcess(ServerLaunch("vllm", model, "student", 64, "float32", log, script=script), 30)
server.start()
print(json.dumps([server.pid, server.port]), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def launch_of(tmp_path: Path) -> Any:
    (tmp_path / "server.py").write_text(SERVER)
    (tmp_path / "model").mkdir()

    def make(mode: str = "", **options: Any) -> ServerLaunch:
        required = ("vllm", tmp_path / "model", "student", 64, "float32", tmp_path / "logs" / "server.log")
        environment = {"FAKE_SERVER": mode}
        return ServerLaunch(*required, script=tmp_path / "server.py", environment=environment, **options)

    return make


@pytest.fixture
def running(launch_of: Any) -> Iterator[ServerProcess]:
    with ServerProcess(launch_of(), 30) as server:
        yield server


def is_running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie, which an init process may be slow to reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Any, timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def worker_of(log: Path) -> int:
    return int(log.read_text().rpartition("worker ")[2].split()[0])


def test_a_server_runs_until_it_is_stopped_with_its_workers(running: ServerProcess) -> None:
    assert is_healthy(running.port)
    assert running.poll() is None
    assert not running.ensure_running()
    pids = [running.pid, worker_of(running.launch.log)]
    running.stop()
    assert not any(map(is_running, pids))  # type: ignore[arg-type]
    assert running.poll() == 128 + signal.SIGTERM


def test_a_caller_that_ignores_sigterm_does_not_pass_that_on(launch_of: Any) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with ServerProcess(launch_of(), 30) as server:
            server.stop()
            assert server.poll() == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_server_that_ignores_sigterm_is_killed(launch_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergeopd.serving.launch._GRACE_S", 0.3)
    server = ServerProcess(launch_of("stubborn"), 30)
    server.start()
    server.stop()
    assert server.poll() == 128 + signal.SIGKILL
    assert not is_running(worker_of(server.launch.log))


@pytest.mark.parametrize("who", ["trainer", "watch"])
def test_no_server_survives_a_kill_of_the_trainer_or_of_the_watching_process(
    launch_of: Any, tmp_path: Path, who: str
) -> None:
    launch = launch_of()
    command = [sys.executable, "-c", TRAINER, launch.script, launch.model, launch.log]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        pid, port = json.loads(trainer.stdout.readline())
        assert is_healthy(port)
        watch = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(trainer.pid if who == "trainer" else watch, signal.SIGKILL)
        wait_until(lambda: not is_running(pid))
        if who == "trainer":
            wait_until(lambda: not is_running(worker_of(launch.log)))
        else:
            os.kill(worker_of(launch.log), signal.SIGKILL)
        trainer.kill()
    assert not is_healthy(port)


def test_a_crashed_server_is_restarted_once_on_its_port(running: ServerProcess) -> None:
    url, first = running.url, running.pid
    for _ in range(2):
        assert running.pid is not None
        os.killpg(running.pid, signal.SIGKILL)
        wait_until(lambda: running.poll() is not None)
        if running.pid == first:
            assert running.ensure_running()
            assert running.url == url
            assert is_healthy(running.port)
    with pytest.raises(
        ServingError, match=r"ended with SIGKILL after it had been restarted\nThe last lines of"
    ):
        running.ensure_running()


def test_the_last_lines_of_a_server_that_fails_are_shown_without_control_characters(launch_of: Any) -> None:
    with pytest.raises(ServingError) as caught:
        ServerProcess(launch_of("fail"), 30).start()
    message = str(caught.value)
    assert "ended with status 3 while it started" in message
    assert r"    ValueError: no such\x1b[31m kernel" in message
    assert "hello from student" in message


def test_a_server_that_never_becomes_ready_is_stopped(launch_of: Any) -> None:
    waited: list[float] = []
    server = ServerProcess(launch_of("loading"), 1.0, waited.append)
    with pytest.raises(ServingError, match="vLLM was not ready after 1 s"):
        server.start()
    assert len(waited) > 1
    assert waited == sorted(waited)
    assert server.poll() is not None
    assert not is_running(worker_of(server.launch.log))


def test_an_interrupt_while_it_starts_stops_it(launch_of: Any) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    server = ServerProcess(launch_of("loading"), 30, interrupt)
    with pytest.raises(KeyboardInterrupt):
        server.start()
    assert server.pid is not None
    assert not is_running(server.pid)


def test_a_port_in_use_is_reported_before_anything_starts(launch_of: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = ServerProcess(launch_of(port=port), 30)
        with pytest.raises(ServingError, match=f"vLLM cannot start: port {port} of 127.0.0.1 cannot be used"):
            server.start()
    assert not server.launch.log.exists()
    check_port_is_free(free_port(), "vLLM")


@pytest.mark.parametrize("missing", ["model", "python"])
def test_what_is_not_there_is_named(launch_of: Any, tmp_path: Path, missing: str) -> None:
    launch = launch_of()
    with pytest.raises(ServingError, match=str(tmp_path / "gone")):
        replace(launch, **{missing: tmp_path / "gone"})


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_vllm_serves_the_sampling_distribution_on_loopback(launch_of: Any) -> None:
    launch = launch_of(devices=(2, 3), weight_transfer="nccl", arguments=("--seed", "3"))
    command = launch.command(8000)
    assert option(command, "--logprobs-mode") == "processed_logprobs"
    assert option(command, "--generation-config") == "vllm"
    assert option(command, "--host") == "127.0.0.1"
    assert option(command, "--tensor-parallel-size") == "2"
    assert option(command, "--weight-transfer-config") == '{"backend": "nccl"}'
    assert "--enable-scale-out" in command
    assert command[-2:] == ["--seed", "3"]
    environment = launch.process_environment({"RANK": "1", "TORCHELASTIC_RUN_ID": "x", "PATH": "/bin"})
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert environment["PATH"] == "/bin"
    # Only for handles of shared memory: it lets requests carry pickled objects.
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in environment
    shared = launch_of(devices=(2,), weight_transfer="ipc").process_environment({})
    assert shared["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"
    assert not {"RANK", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS"} & set(environment)


def test_sglang_without_devices_runs_on_the_cpu(tmp_path: Path) -> None:
    launch = ServerLaunch("sglang", tmp_path, "student", 64, "float32", tmp_path / "log")
    command = launch.command(8000)
    assert command[:3] == [sys.executable, "-m", "sglang.launch_server"]
    assert option(command, "--device") == "cpu"
    assert option(command, "--sampling-backend") == "pytorch"
    assert option(command, "--context-length") == "64"
    environment = launch.process_environment({"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "0"})
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["SGLANG_USE_CPU_ENGINE"] == "1"


def test_servers_of_a_run_start_together_are_restarted_once_and_end_with_it(
    launch_of: Any, tmp_path: Path
) -> None:
    servers = LaunchedServers([launch_of(), replace(launch_of(), log=tmp_path / "other.log")], 30)
    num_ready: list[int] = []
    urls = servers.start(num_ready.append)
    assert servers.num_to_start == len(set(urls)) == 2
    assert num_ready
    lost, other = servers._processes
    servers.check(lambda: None)
    assert lost.pid is not None
    for is_last in (False, True):
        os.kill(lost.pid, signal.SIGKILL)
        wait_until(lambda: lost.poll() is not None)
        if is_last:
            with pytest.raises(ServingError, match="after it had been restarted"):
                servers.check(lambda: None)
        else:
            servers.check(lambda: None)
            assert is_healthy(lost.port)
            assert lost.url in urls
    servers.close()
    assert other.pid is not None
    assert not is_running(other.pid)
