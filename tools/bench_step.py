"""One distillation step here and in TRL's DistillationTrainer: the same job, seconds and peak memory.

    python tools/bench_step.py [--json]

A random Qwen3 generates a fixed number of tokens per prompt, one random teacher of the same size scores them
(reverse KL over the whole vocabulary), AdamW updates. Each side is a new process with one thread; their steps
alternate, so that slow periods of the machine affect all sides. Everything runs twice: with glibc keeping
freed blocks, and with glibc's default. A third side is the bound: only the job's matrix products, in fixed
buffers. Without trl, the TRL side is skipped with a message:

    pip install 'trl==1.16.*' datasets
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, Self

from step_bench.job import model_sizes, write_job
from step_bench.sides import RUNNERS, Steps

# glibc returns freed blocks above a threshold to the system, and their pages are faulted in again.
KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


def main() -> None:
    """Write the job, run the sides alternately, print."""
    arguments = parse()
    if arguments.side:
        steps = Steps(sys.stdout)
        with contextlib.redirect_stdout(sys.stderr):
            RUNNERS[arguments.side](arguments, steps)
        return
    problem = trl_problem()
    sides = [side for side in RUNNERS if side != "trl" or problem is None]
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        write_job(arguments)
        result = measure(arguments, sides, KEEPING)
        result["default_allocator"] = measure(arguments, sides, {})
    result["conditions"] = conditions(arguments)
    if problem is not None:
        result["trl_skipped"] = problem
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result)


def parse() -> argparse.Namespace:
    """Parse the command line; the defaults are the conditions of docs/benchmarks.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sizes(parser)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side, after one warm-up")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--side", choices=tuple(RUNNERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add the options for the job's sizes."""
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="mean prompt length, give or take an eighth")
    parser.add_argument("--new-tokens", type=int, default=128)


def trl_problem() -> str | None:
    """Return why TRL is skipped, or None."""
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return "trl is not installed here; pip install 'trl==1.16.*' datasets"
    if not version.startswith("1.16."):
        return f"trl is {version}; the comparison is with 1.16: pip install 'trl==1.16.*'"
    return None


def measure(arguments: argparse.Namespace, sides: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Return medians over the timed steps and the peak of every side."""
    with contextlib.ExitStack() as stack:
        processes = {side: stack.enter_context(Side(arguments, side, environment)) for side in sides}
        rounds = [
            {side: process.step() for side, process in processes.items()} for _ in range(arguments.steps + 1)
        ][1:]
    result: dict[str, Any] = {}
    for side in sides:
        rows = [row[side] for row in rounds]
        result |= {f"{side}_{name}": round(median(row[name] for row in rows), 4) for name in rows[0]}
        result[f"{side}_rss"] = max(row["rss"] for row in rows)
    if "trl" in sides:
        # Ratios of neighbouring steps, to reduce the influence of other processes.
        for name, key in (("ratio", "s"), ("cpu_ratio", "cpu_s")):
            result[name] = round(median(row["trl"][key] / row["mergeopd"][key] for row in rounds), 3)
        result["rss_ratio"] = round(result["mergeopd_rss"] / result["trl_rss"], 3)
    return result


class Side:
    """This file in a new process, as one side; with `checkout`, the same file and package of another one."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        side: str,
        environment: dict[str, str],
        checkout: Path = Path(__file__).parents[1],
    ) -> None:
        names = ("hidden", "layers", "vocab", "batch", "prompt", "new_tokens", "steps", "folder")
        options = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in names]
        variables = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        self._side = side
        fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(checkout)}
        self._log = arguments.folder / f"{side}-{checkout.name}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, checkout / "tools" / "bench_step.py", f"--side={side}", *options],
                env=variables | fixed | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def __enter__(self) -> Self:
        return self

    def step(self) -> dict[str, float]:
        """Run one step and return its times. Exits with the side's output when it failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._log.read_text()}\nbench_step: the {self._side} side failed, see above")
        return json.loads(line)  # type: ignore[no-any-return]

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    packages = ("torch", "transformers", "trl")
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    job = ("batch", "prompt", "new_tokens", "steps")
    return {
        **model_sizes(arguments),
        **{name: getattr(arguments, name) for name in job},
        "dtype": "float32",
        "threads": 1,
        **versions,
    }


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    columns = ("generation_s", "teacher_s", "update_s", "s", "cpu_s")
    for title, figures in (
        ("glibc keeps freed blocks", result),
        ("glibc as it comes", result["default_allocator"]),
    ):
        table = Table(title=f"seconds of a step, one thread; {title}")
        for column in ("", "generation", "teacher", "update", "all", "CPU", "peak MiB"):
            table.add_column(column, justify="right" if column else "left")
        for side in RUNNERS:
            if f"{side}_s" in figures:
                numbers = [f"{figures[f'{side}_{column}']:.2f}" for column in columns]
                table.add_row(side, *numbers, f"{figures[f'{side}_rss'] / 2**20:.0f}")
        console.print(table)
        if "ratio" in figures:
            console.print(
                f"TRL takes {figures['ratio']:.2f} times as long, "
                f"{figures['cpu_ratio']:.2f} times the CPU seconds; "
                f"mergeopd has {figures['rss_ratio']:.2f} of its peak memory.\n"
            )
    if "trl_skipped" in result:
        console.print(f"Without TRL: {result['trl_skipped']}")
    console.print(", ".join(f"{name}={value}" for name, value in result["conditions"].items()))


if __name__ == "__main__":
    main()
