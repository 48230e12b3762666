"""Kill and resume a run repeatedly, and compare its end with an uninterrupted run, bit for bit.

    python tools/soak.py recipes/quickstart.yaml --kills 30 --seed 0
    python tools/soak.py recipe.yaml --minutes 600 --set rollout.batch_size=8

Half of the starts are killed (SIGKILL) at a random moment, imports included, the other half at a random call
of a random place: between two tokens, in a teacher's pass, around an optimizer step, between the files of a
checkpoint, at a rename and so on (`tools/fault.py`). Some finish before. The next run begins in a new folder,
without cached teacher responses. Prints a line per kill and a summary; exits with 1 when any run fails or
differs from the uninterrupted one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

FAULT = Path(__file__).with_name("fault.py")
_PATIENCE = 20  # a process that takes this many times as long as the uninterrupted run is considered hung


def outcome(folder: Path) -> dict[str, str]:
    """Return all results of a finished run that must not depend on interruptions, by name, as text.

    Digests of export and last checkpoint, its update, metrics and result without timings, samples.
    """
    checkpoints = sorted((folder / "checkpoints").glob("step-*[0-9]"), key=lambda path: int(path.name[5:]))
    state = json.loads((checkpoints[-1] / "state.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = folder / "result.json"
    measured = json.loads(result.read_text()) if result.is_file() else {}
    measured.pop("seconds", None)
    return {
        "weights and optimizer": _digests(checkpoints[-1])["student.safetensors"],
        "progress": json.dumps(state["progress"]),
        **{f"export/{name}": digest for name, digest in _digests(folder / "export").items()},
        "metrics": "\n".join(json.dumps({**line, "cost": None}) for line in lines),
        "samples": (folder / "rollouts" / "samples.jsonl").read_text(encoding="utf-8"),
        "result": json.dumps(measured),
    }


def _digests(folder: Path) -> dict[str, str]:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return {name: record["sha256"] for name, record in files.items()}


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

    def prepare(self) -> None:
        """Run without interruption twice: once for time and outcome, once to count calls."""
        start = time.monotonic()
        self._expect_end("undisturbed", [sys.executable, "-m", "mergeopd"])
        self.duration_s = time.monotonic() - start
        self.expected = outcome(self.folder / "undisturbed")
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
        self._expect_end(name, [sys.executable, "-m", "mergeopd"])
        actual = outcome(self.folder / name)
        different = [key for key in {**self.expected, **actual} if self.expected.get(key) != actual.get(key)]
        print(f"       {name:8}  {'ends DIFFERENTLY' if different else 'ends bit-identically'}", flush=True)
        if not different:
            shutil.rmtree(self.folder / name)
        return different

    def _kill(self, name: str) -> str | None:
        """Start or resume a run and kill it; return where, or None if it finished before."""
        if self.rng.random() < 0.5:
            place = self.rng.choice(sorted(self.calls))
            call = self.rng.randint(1, self.calls[place])
            command = [sys.executable, str(FAULT), f"{place}:{call}:KILL"]
            timeout, moment = _PATIENCE * self.duration_s, f"{place}, call {call}"
        else:
            command = [sys.executable, "-m", "mergeopd"]
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--kills", type=int, help="stop after this many kills")
    parser.add_argument("--minutes", type=float, help="or after this time")
    parser.add_argument("--seed", type=int, default=0, help="of moments and places")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--folder", type=Path, help="where the runs go; default: a temporary folder")
    arguments = parser.parse_args()
    if arguments.kills is None and arguments.minutes is None:
        parser.error("missing option: --kills N or --minutes M")
    max_kills = sys.maxsize if arguments.kills is None else arguments.kills
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        soak = Soak(arguments.recipe, arguments.overrides, folder.resolve(), random.Random(arguments.seed))
        start = time.monotonic()
        soak.prepare()
        print(f"undisturbed: {soak.duration_s:.1f} s, {sum(soak.calls.values())} calls of places", flush=True)
        deadline = float("inf") if arguments.minutes is None else start + 60 * arguments.minutes
        failures = []
        while len(soak.kills) < max_kills and time.monotonic() < deadline:
            failures += [f"run-{soak.num_runs}: {key}" for key in soak.run_once(max_kills, deadline)]
    by_place: dict[str, int] = {}
    for place in soak.kills:
        name = "any moment" if place.startswith("at ") else place.split(",")[0]
        by_place[name] = by_place.get(name, 0) + 1
    print("\nkills at: " + ", ".join(f"{name} {number}" for name, number in sorted(by_place.items())))
    print(f"kills {len(soak.kills)}, runs {soak.num_runs}, differences {len(failures)}")
    print(f"{(time.monotonic() - start) / 60:.1f} minutes")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
