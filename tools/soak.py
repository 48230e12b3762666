"""Kill and resume a run repeatedly, and compare its end with an uninterrupted run, bit for bit.

    python tools/soak.py recipes/quickstart.yaml --kills 30 --seed 0
    python tools/soak.py recipe.yaml --minutes 600 --set rollout.batch_size=8
    python tools/soak.py recipe.yaml --kills 50 --server "COMMAND OF AN INFERENCE SERVER" [--samples-only]

Half of the starts are killed (SIGKILL) at a random moment, imports included, the other half at a random call
of a random place: between two tokens, in a teacher's pass, around an optimizer step, between the files of a
checkpoint, at a rename and so on (`tools/fault.py`). Some finish before. The next run begins in a new folder,
without cached teacher responses. Prints a line per kill and a summary; exits with 1 when any run fails or
differs from the uninterrupted one.

With `--server`, that server is started for all runs, half of the kills are of it, and it is started again:
the run must survive, or stop with the advice to start it. `--samples-only` compares what every update was
trained on, for responses that differ from run to run (`rollout.ahead`).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

FAULT = Path(__file__).with_name("fault.py")
_START_S = 600.0  # that a server may take to start
_PATIENCE = 20  # a process that takes this many times as long as the uninterrupted run is considered hung


def outcome(folder: Path) -> dict[str, str]:
    """Return all results of a finished run that must not depend on interruptions, by name, as text.

    Digests of export and last checkpoint, its update, metrics and result without timings, samples.
    """
    checkpoints = sorted((folder / "checkpoints").glob("step-*[0-9]"), key=lambda path: int(path.name[5:]))
    state = json.loads((checkpoints[-1] / "state.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # Times, retries and lost servers.
    lines = [{**line, "serving": None} for line in lines]
    result = folder / "result.json"
    measured = json.loads(result.read_text()) if result.is_file() else {}
    measured.pop("seconds", None)
    return {
        "weights and optimizer": _digest_of_tensors(checkpoints[-1]),
        "progress": json.dumps(state["progress"]),
        **{f"export/{name}": digest for name, digest in _digests(folder / "export").items()},
        "metrics": "\n".join(json.dumps({**line, "cost": None}) for line in lines),
        "samples": (folder / "rollouts" / "samples.jsonl").read_text(encoding="utf-8"),
        "result": json.dumps(measured),
    }


def trained(file: Path) -> dict[str, str]:
    """Return what every update was trained on, by number; resumed processes repeat the last ones."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {f"update {line['update']}": json.dumps(line["trained"]) for line in lines}


def is_doubled(updates: dict[str, str]) -> list[str]:
    """Return the student's responses that several updates were trained on."""
    every = [json.dumps(one) for line in updates.values() for one in json.loads(line) if one[1] == "student"]
    return sorted({one for one in every if every.count(one) > 1})


@dataclass
class InferenceServer:
    """A server with the command line `command`, which is killed and started again."""

    command: str
    url: str
    log: Path
    _process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                shlex.split(self.command), stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        """Wait until it is healthy."""
        end = time.monotonic() + _START_S
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2).read()
                return
            except OSError:
                if time.monotonic() > end:
                    raise SystemExit(f"the server does not start; see {self.log}") from None
                time.sleep(0.2)

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _digests(folder: Path) -> dict[str, str]:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return {name: record["sha256"] for name, record in files.items()}


def _digest_of_tensors(checkpoint: Path) -> str:
    """Return a digest of all tensors by name, whichever process wrote which part of them."""
    from mergeopd.storage.state_parts import INDEX, PartsFolder

    digest = hashlib.sha256()
    index = json.loads((checkpoint / INDEX).read_text())
    for group in sorted(index["tensors"]):
        tensors = PartsFolder.open_group(checkpoint, index, group)
        for name in sorted(tensors.shapes):
            digest.update(name.encode() + tensors.read(name).numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Soak:
    """Runs of one recipe, killed at random."""

    recipe: Path
    overrides: Sequence[str]
    folder: Path
    rng: random.Random
    duration_s: float = 0.0
    calls: dict[str, int] = field(default_factory=dict)
    expected: dict[str, str] = field(default_factory=dict)
    kills: list[str] = field(default_factory=list)  # the place of each
    num_runs: int = 0
    server: InferenceServer | None = None
    is_samples_only: bool = False

    def prepare(self) -> None:
        """Run without interruption twice: once for time and outcome, once to count calls."""
        start = time.monotonic()
        self._expect_end("undisturbed", self._command("undisturbed"))
        self.duration_s = time.monotonic() - start
        self.expected = self._outcome("undisturbed")
        counts = self.folder / "calls.json"
        self._expect_end("counted", [sys.executable, str(FAULT), "--count", str(counts)])
        self.calls = {place: n for place, n in json.loads(counts.read_text()).items() if n}

    def run_once(self, max_kills: int, deadline: float) -> list[str]:
        """Kill a new run until it has finished; return its differences from the uninterrupted one."""
        self.num_runs += 1
        name = f"run-{self.num_runs}"
        while len(self.kills) < max_kills and time.monotonic() < deadline:
            place = self._kill(name)
            if place is None:
                break
            self.kills.append(place)
            print(f"{len(self.kills):5}  {name:8}  {place:24}  {self._standing(name)}", flush=True)
        self._expect_end(name, self._command(name))
        actual = self._outcome(name)
        different = [key for key in {**self.expected, **actual} if self.expected.get(key) != actual.get(key)]
        print(f"       {name:8}  {'ends DIFFERENTLY' if different else 'ends bit-identically'}", flush=True)
        if not different:
            shutil.rmtree(self.folder / name)
        return different

    def _command(self, name: str, *fault: str) -> list[str]:
        return [sys.executable, str(FAULT), "--trained", str(self.folder / f"{name}-trained"), *fault]

    def _outcome(self, name: str) -> dict[str, str]:
        """Return all that must be equal after interruptions."""
        updates = trained(self.folder / f"{name}-trained")
        if doubled := is_doubled(updates):
            raise SystemExit(f"{name} was trained on {len(doubled)} samples twice: {doubled[:3]}")
        return updates if self.is_samples_only else {**updates, **outcome(self.folder / name)}

    def _kill_server(self, name: str) -> str | None:
        """Kill the server at a random moment of a run, which then makes some more updates."""
        assert self.server is not None
        process = self._start(name, self._command(name))
        moment = self.rng.uniform(0.3, 1.0) * self.duration_s
        try:
            output, _ = process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            self.server.kill()
            self.server.start()
            self.server.wait()
            with contextlib.suppress(subprocess.TimeoutExpired):
                output, _ = process.communicate(timeout=self.rng.uniform(0.1, 0.5) * self.duration_s)
                # `check` and an evaluation may stop, as their server is away for long.
                if process.returncode and "start the server" not in output:
                    raise SystemExit(f"{name} did not survive its server:\n{output}") from None
            process.kill()
            process.communicate()
            return f"server at {moment:.2f} s"
        if process.returncode:
            raise SystemExit(f"{name} failed with code {process.returncode}:\n{output}")
        return None

    def _kill(self, name: str) -> str | None:
        """Start or resume a run and kill it or its server; return where, or None if it finished before."""
        if self.server is not None and self.rng.random() < 0.5:
            return self._kill_server(name)
        if self.rng.random() < 0.5:
            place = self.rng.choice(sorted(self.calls))
            call = self.rng.randint(1, self.calls[place])
            command = self._command(name, f"{place}:{call}:KILL")
            timeout, moment = _PATIENCE * self.duration_s, f"{place}, call {call}"
        else:
            command = self._command(name)
            timeout = self.rng.uniform(0.0, self.duration_s)
            moment = f"at {timeout:.2f} s"
        process = self._start(name, command)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            if moment.startswith("at "):
                return moment
            raise SystemExit(f"{name} hangs ({moment})") from None
        if process.returncode == -9:
            return moment
        if process.returncode:
            raise SystemExit(f"{name} failed with code {process.returncode} ({moment}):\n{output}")
        return None

    def _expect_end(self, name: str, command: Sequence[str]) -> None:
        process = self._start(name, command)
        output, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{name} failed with code {process.returncode}:\n{output}")

    def _start(self, name: str, command: Sequence[str]) -> subprocess.Popen[str]:
        arguments = ["run", str(self.recipe)]
        for override in (
            *self.overrides,
            f"output={self.folder / name}",
            f"text_cache={self.folder / name}-texts",
        ):
            arguments += ["--set", override]
        return subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ,
        )

    def _standing(self, name: str) -> str:
        """Describe the progress of a run folder."""
        metrics, checkpoints = self.folder / name / "metrics.jsonl", self.folder / name / "checkpoints"
        lines = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        saved = (
            [int(path.name[5:]) for path in checkpoints.glob("step-*[0-9]")] if checkpoints.is_dir() else []
        )
        exported = ", exported" if (self.folder / name / "export").is_dir() else ""
        return f"after update {lines}, saved at {max(saved, default=0)}{exported}"


def url_of(recipe: Path, overrides: Sequence[str]) -> str:
    """Return the address of the recipe's only server."""
    from mergeopd.recipe.resolve import read

    plan = read(recipe, overrides).plan
    urls = None if plan is None else getattr(plan.rollout, "url", None)
    if urls is None or len(urls) != 1:
        sys.exit(f"{recipe} does not name one server as `rollout.url`")
    return str(urls[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--kills", type=int, help="stop after this many kills")
    parser.add_argument("--minutes", type=float, help="or after this time")
    parser.add_argument("--seed", type=int, default=0, help="of moments and places")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--server", metavar="COMMAND", help="of a server at the recipe's `rollout.url`")
    parser.add_argument("--samples-only", action="store_true", help="compare what updates are trained on")
    parser.add_argument("--folder", type=Path, help="where the runs go; default: a temporary folder")
    arguments = parser.parse_args()
    if arguments.kills is None and arguments.minutes is None:
        parser.error("missing option: --kills N or --minutes M")
    max_kills = sys.maxsize if arguments.kills is None else arguments.kills
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the stack, which ends the server
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        soak = Soak(arguments.recipe, arguments.overrides, folder.resolve(), random.Random(arguments.seed))
        soak.is_samples_only = arguments.samples_only
        if arguments.server is not None:
            soak.folder.mkdir(parents=True, exist_ok=True)
            url = url_of(arguments.recipe, arguments.overrides)
            soak.server = InferenceServer(arguments.server, url, soak.folder / "server.log")
            stack.callback(soak.server.kill)
            soak.server.start()
            soak.server.wait()
        start = time.monotonic()
        soak.prepare()
        print(f"undisturbed: {soak.duration_s:.1f} s, {sum(soak.calls.values())} calls of places", flush=True)
        deadline = float("inf") if arguments.minutes is None else start + 60 * arguments.minutes
        failures = []
        while len(soak.kills) < max_kills and time.monotonic() < deadline:
            failures += [f"run-{soak.num_runs}: {key}" for key in soak.run_once(max_kills, deadline)]
    by_place: dict[str, int] = {}
    for place in soak.kills:
        is_server = place.startswith("server ")
        name = "any moment" if place.startswith("at ") else "server" if is_server else place.split(",")[0]
        by_place[name] = by_place.get(name, 0) + 1
    print("\nkills at: " + ", ".join(f"{name} {number}" for name, number in sorted(by_place.items())))
    print(f"kills {len(soak.kills)}, runs {soak.num_runs}, differences {len(failures)}")
    print(f"{(time.monotonic() - start) / 60:.1f} minutes")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
