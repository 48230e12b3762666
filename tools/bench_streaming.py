"""Measure teachers that are streamed layer by layer against the same teachers held whole.

    OMP_NUM_THREADS=1 python tools/bench_streaming.py [--json]

A random Qwen3 scores random sequences: whole and streamed in turn (seconds, equal bits, bytes read); under a
limit of the system on the address space (`RLIMIT_AS`) that leaves a quarter of the teacher's size; as 1, 4
and 16 teachers that share the tokens; and with reads slowed down as by a disk of that rate. Files are in the
file cache. CPU seconds count the reading thread as well, so that nothing is hidden in them. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench_teachers import VOCAB, peak_anonymous, write_model

BATCH_TOKENS, LENGTH = 1024, 128
COUNTS = (1, 4, 16)
# Reading takes this share of the time of computation in the throttled pass.
THROTTLED = 0.75


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16_384, help="that the teachers score in all")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(CASES[arguments.case](Job(arguments.folder, arguments.tokens, arguments.repeats))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"hidden_size": arguments.hidden, "intermediate_size": 4 * arguments.hidden}
        write_model(folder, seed=0, num_hidden_layers=arguments.layers, **sizes)
        result = {case: in_own_process(case, folder, arguments) for case in CASES}
    for one in result["many"]:
        one.update(result.pop(f"peak{one['teachers']}"))
    print(json.dumps(result) if arguments.json else table(result))


def in_own_process(case: str, folder: Path, arguments: argparse.Namespace) -> Any:
    """Measure a case in a new process, with one arena of the C library."""
    command = [sys.executable, __file__, "--case", case, "--folder", str(folder)]
    command += ["--tokens", str(arguments.tokens), "--repeats", str(arguments.repeats)]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout)


@dataclass
class Job:
    """A teacher, under one name or several, and the sequences to score."""

    folder: Path
    tokens: int
    repeats: int

    def __post_init__(self) -> None:
        import torch

        from mergeopd.models.checkpoint import Checkpoint
        from mergeopd.teacher.local import TeacherSource, TeacherStore
        from mergeopd.teacher.protocol import TeacherSequence

        torch.set_num_threads(1)
        names = [f"t{i}" for i in range(max(COUNTS))]
        source = TeacherSource(self.folder, "float32", VOCAB)
        self.store = TeacherStore(dict.fromkeys(names, source), torch.device("cpu"))
        tensors = Checkpoint.open(self.folder).tensors
        self.layer_bytes = sum(info.num_bytes for name, info in tensors.items() if ".layers." in name)
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(1, VOCAB, (self.tokens // LENGTH, LENGTH), generator=random).tolist()
        self.sequences = [TeacherSequence(row[: LENGTH // 4], row[LENGTH // 4 :]) for row in ids]

    def score(self, *, streamed: bool, num: int = 1, keep: bool = False) -> list[Any]:
        """Let each of `num` teachers score its share of the sequences; return its rows if they are kept."""
        from mergeopd.models.residency import Held
        from mergeopd.teacher.local import LocalTeacher
        from mergeopd.teacher.protocol import LOCAL, TargetSpec

        held = Held(self.tokens if streamed else None, 0, "of the benchmark")
        rows = []
        for i in range(num):
            teacher = LocalTeacher(f"t{i}", self.store, LOCAL, None, call, unused, held)
            with teacher.open() as session:
                for _, states in session.score(self.sequences[i::num], TargetSpec("hidden"), BATCH_TOKENS):
                    rows += [states] if keep else []
        return rows


def call(work: Callable[[], None]) -> None:
    work()


def unused(source: object) -> Any:
    raise AssertionError("the benchmark generates nothing")


def pair(job: Job) -> dict[str, Any]:
    """Score with the teacher whole and streamed, in turn."""
    import torch

    whole, streamed = job.score(streamed=False, keep=True), job.score(streamed=True, keep=True)
    equal = all(torch.equal(a, b) for a, b in zip(whole, streamed, strict=True))
    del whole, streamed
    whole_s, streamed_s = [], []
    for _ in range(job.repeats):
        whole_s.append(both(lambda: job.score(streamed=False)))
        streamed_s.append(both(lambda: job.score(streamed=True)))
    before = job.store.bytes_read("t0")
    job.score(streamed=True)
    return {
        "whole": medians(whole_s, whole_s),
        "streamed": medians(streamed_s, whole_s),
        "equal_bits": equal,
        "layer_bytes": job.layer_bytes,
        "bytes_read_in_a_pass": job.store.bytes_read("t0") - before,
    }


def limited(job: Job) -> dict[str, Any]:
    """Score within a quarter of the layers' size, set as a limit on the address space."""
    job.sequences = job.sequences[: max(1, BATCH_TOKENS // LENGTH // 4)]
    allowed = job.layer_bytes // 4
    size = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmSize" in line)
    limit = int(size.split()[1]) * 1024 + allowed
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    outcome: dict[str, Any] = {"allowed_bytes": allowed, "layer_bytes": job.layer_bytes}
    for is_streamed in (False, True):
        try:
            job.score(streamed=is_streamed)
            error = None
        except (RuntimeError, OSError, MemoryError) as raised:
            error = str(raised).splitlines()[0]
        outcome["streamed" if is_streamed else "resident"] = error or "scored"
    return outcome


def many(job: Job) -> list[dict[str, float]]:
    """Divide the tokens among 1, 4 and 16 streamed teachers."""
    seconds: dict[int, list[tuple[float, float]]] = {num: [] for num in COUNTS}
    job.score(streamed=True)
    for _ in range(job.repeats):
        for num, own in seconds.items():
            own.append(both(partial(job.score, streamed=True, num=num)))
    return [{"teachers": num, **medians(own, seconds[1])} for num, own in seconds.items()]


def peak_of(num: int, job: Job) -> dict[str, int]:
    """Return the memory of a process in which `num` streamed teachers score the tokens."""
    job.score(streamed=True)  # what is imported and allocated once
    with peak_anonymous() as peak:
        job.score(streamed=True, num=num)
    return {"peak_anonymous_bytes": peak[0]}


def throttled(job: Job) -> dict[str, float]:
    """Slow reads down to a rate at which they take most of the time of computation."""
    job.score(streamed=True)
    rate = job.layer_bytes / (THROTTLED * timed(lambda: job.score(streamed=True)))
    seconds, read, waited = [], [], []
    for _ in range(job.repeats):
        with slow_reads(rate) as (own_read, own_waited):
            seconds.append(timed(lambda: job.score(streamed=True)))
        read.append(sum(own_read))
        waited.append(sum(own_waited))
    return {
        "bytes_per_s": rate,
        "seconds": statistics.median(seconds),
        "reading_s": statistics.median(read),
        "waiting_s": statistics.median(waited),
        "hidden_share": statistics.median(1 - b / a for a, b in zip(read, waited, strict=True)),
    }


@contextmanager
def slow_reads(rate: float) -> Any:
    """Make reads of checkpoints take as long as at `rate` bytes per second.

    Yields the seconds of each read, and those for which the computation waited for each layer.
    """
    from mergeopd.models.checkpoint import Checkpoint
    from mergeopd.teacher.streaming.reader import LayerReader

    read: list[float] = []
    waited: list[float] = []
    read_parts, next_layer = Checkpoint.read_parts, LayerReader._next

    def slowed(self: Checkpoint, name: str, parts: Iterable[tuple[int, memoryview]]) -> None:
        own, start = list(parts), time.perf_counter()
        read_parts(self, name, own)
        time.sleep(max(0.0, sum(len(buffer) for _, buffer in own) / rate - (time.perf_counter() - start)))
        read.append(time.perf_counter() - start)

    def timed_next(self: LayerReader) -> Any:
        start = time.perf_counter()
        layer = next_layer(self)
        waited.append(time.perf_counter() - start)
        return layer

    Checkpoint.read_parts, LayerReader._next = slowed, timed_next  # type: ignore[method-assign]
    try:
        yield read, waited
    finally:
        Checkpoint.read_parts, LayerReader._next = read_parts, next_layer  # type: ignore[method-assign]


def timed(work: Callable[[], object]) -> float:
    return both(work)[0]


def both(work: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of `work`: by the clock, and of this process's CPU time."""
    start, start_cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - start_cpu


def medians(own: Sequence[tuple[float, float]], of: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return the medians of seconds and of their ratios to those of the same repetitions."""
    result = {}
    for i, name in enumerate(("", "cpu_")):
        result[f"{name}seconds"] = statistics.median(one[i] for one in own)
        result[f"{name}ratio"] = statistics.median(b[i] / a[i] for a, b in zip(of, own, strict=True))
    return result


CASES: dict[str, Callable[[Job], Any]] = {
    "pair": pair,
    "limited": limited,
    "many": many,
    "throttled": throttled,
    **{f"peak{num}": partial(peak_of, num) for num in COUNTS},
}


def table(result: dict[str, Any]) -> str:
    """Format the measurements."""
    of_pair, of_limit, slow = result["pair"], result["limited"], result["throttled"]
    lines = [
        f"layers of {of_pair['layer_bytes'] / 2**20:,.0f} MiB, whole {of_pair['whole']['seconds']:.2f} s, "
        f"streamed {of_pair['streamed']['seconds']:.2f} s: ratio {of_pair['streamed']['ratio']:.2f}, "
        f"of CPU time {of_pair['streamed']['cpu_ratio']:.2f}, "
        f"{'equal' if of_pair['equal_bits'] else 'DIFFERENT'} bits",
        f"within {of_limit['allowed_bytes'] / 2**20:,.0f} MiB: streamed {of_limit['streamed']}; "
        f"whole: {of_limit['resident']}",
        "| teachers | seconds | ratio | of CPU time | peak anonymous memory |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {one['teachers']} | {one['seconds']:.2f} | {one['ratio']:.2f} | "
            f"{one['cpu_ratio']:.2f} | {one['peak_anonymous_bytes'] / 2**20:,.0f} MiB |"
            for one in result["many"]
        ),
        f"at {slow['bytes_per_s'] / 2**20:,.0f} MiB/s: {slow['seconds']:.2f} s, {slow['reading_s']:.2f} s of "
        f"reading, {slow['waiting_s']:.2f} s of waiting for it, {slow['hidden_share']:.0%} hidden",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
