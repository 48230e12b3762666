"""Ranks that save and restore checkpoints, killed at random: a driver forks them, since imports take seconds.

    python checkpoint_worker.py FOLDER KILLS SEED

Every start has two to four ranks. They restore the newest checkpoint and then save one update after another, each
while the next one changes the state. The state of an update is a function of its number, so that every rank
knows what it must read. Prints a JSON object: how many kills met a save in flight, and what was lost.
"""

import errno
import gc
import json
import os
import random
import signal
import sys
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from mergeopd.distributed.communicator import TorchCommunicator
from mergeopd.engine import checkpoint
from mergeopd.engine.checkpoint import Checkpoints, Record
from mergeopd.engine.progress import Progress
from mergeopd.errors import PeerFailed, StorageError
from mergeopd.reporting.events import CheckpointSaved, CheckpointSkipped
from mergeopd.storage import state_parts
from mergeopd.storage.state_parts import dealt_parts
from mergeopd.teacher.snapshots import StudentSnapshots

SHAPES = {"master.a": (301, 64), "master.b": (40,), "adamw.exp_avg.a": (301, 64), "adamw.step.a": ()}
PLAN = SimpleNamespace(hash="plan", checkpoint=SimpleNamespace(keep=2))
LIMIT_S = 30.0


def state_after(update):
    """All tensors after an update."""
    return {name: torch.full(shape, float(update)) for name, shape in SHAPES.items()}


class Student:
    """A student whose ranks all have the same state and divide it."""

    def __init__(self, ranks):
        self.ranks, self.tensors = ranks, state_after(0)

    def state(self):
        return dealt_parts(self.tensors, self.ranks.rank, self.ranks.size)

    def state_shapes(self):
        return {name: shape for name, shape in SHAPES.items() if name.startswith("master.")}

    def load_state(self, saved):
        for name, tensor in self.tensors.items():
            tensor.copy_(saved.read(name))


class Pipe:
    """A reporter that writes a line for each event to a pipe."""

    def __init__(self, descriptor):
        self.descriptor = descriptor

    def tell(self, word, number=0):
        os.write(self.descriptor, f"{word} {number}\n".encode())

    def emit(self, event):
        if isinstance(event, CheckpointSaved):
            self.tell("saved", event.update)
        if isinstance(event, CheckpointSkipped):
            self.tell(f"skipped:{event.reason.replace(' ', '_')}")


def slowly(save_file):
    def save(*arguments, **options):
        time.sleep(0.01)
        save_file(*arguments, **options)

    return save


def train(rank, world, store, folder, pipe, full_rank=None):
    """Restore, then save 20 updates; each state changes as soon as its save has begun."""
    torch.set_num_threads(1)
    url = f"file://{store}"
    dist.init_process_group(
        "gloo", init_method=url, rank=rank, world_size=world, timeout=timedelta(seconds=20)
    )
    ranks = TorchCommunicator("here")
    shown = pipe if rank == 0 else Pipe(os.open(os.devnull, os.O_WRONLY))
    student = Student(ranks)
    kept = Checkpoints(folder, PLAN, student, StudentSnapshots((), dict, dict), ranks)
    first = kept.restore(["plan"], shown).progress.update
    if first:
        expected = state_after(first)
        whole = all(torch.equal(student.tensors[name], expected[name]) for name in SHAPES)
        pipe.tell("restored" if whole else "lost", first)
    state_parts._MAX_FILE_BYTES = 20_000
    state_parts.save_file = slowly(state_parts.save_file)
    if rank == full_rank:
        state_parts.save_file = full
    for update in range(first + 1, first + 21):
        for name, tensor in state_after(update).items():
            student.tensors[name].copy_(tensor)
        if rank == 0:
            pipe.tell("saving", update)
        kept.save(Record(Progress(update, update, update), {}), shown)
        kept.poll(shown)
    kept.finish(shown)


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def forked(folder, world, number, descriptor, **options):
    """Fork the ranks of a start; their process ids."""
    ids = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                train(
                    rank,
                    world,
                    folder / f"store-{number}",
                    folder / "checkpoints",
                    Pipe(descriptor),
                    **options,
                )
                code = 0
            except (StorageError, PeerFailed) as error:
                Pipe(descriptor).tell(f"{type(error).__name__}:{str(error).replace(' ', '_')}", rank)
            except RuntimeError as error:
                if "gloo" not in str(error):
                    traceback.print_exc()
            finally:
                os._exit(code)
        ids.append(child)
    return ids


def lines_of(reader, until, deadline):
    """Read lines from the ranks until one begins with `until`, or all ranks have ended."""
    rest = b""
    while time.monotonic() < deadline:
        part = b""
        with suppress(BlockingIOError):
            part = os.read(reader, 4096)
            if not part:
                return
        rest += part
        *lines, rest = rest.split(b"\n")
        for line in lines:
            word, number = line.decode().split()
            yield word, int(number)
            if word == until:
                return
        time.sleep(0.001)
    raise SystemExit("a start hangs")


def start(folder, number, rng, world, known, **options):
    """Start ranks, kill one or all of them at random, and collect what they reported; whether a save was in flight."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    ids = forked(folder, world, number, writer, **options)
    os.close(writer)
    deadline = time.monotonic() + LIMIT_S
    hit = False
    try:
        if not options:
            for _ in range(rng.randint(1, 3)):
                known.extend(lines_of(reader, "saving", deadline))
            time.sleep(rng.uniform(0.0, 0.12))
            hit = any(path.name.endswith(".partial") for path in (folder / "checkpoints").iterdir())
            victims = ids if rng.random() < 0.3 else [rng.choice(ids)]
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
            time.sleep(rng.uniform(0.0, 0.05))  # until the launcher ends the others
            for victim in ids:
                os.kill(victim, signal.SIGKILL)
        known.extend(lines_of(reader, "", deadline))
    finally:
        for one in ids:
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
            os.waitpid(one, 0)
        os.close(reader)
    return hit


def main(folder, num_kills, seed):
    checkpoint._GRACE_S = 0.2
    gc.freeze()
    rng, lost, hits, newest = random.Random(seed), [], 0, 0
    for number in range(num_kills):
        known = []
        hits += start(folder, number, rng, rng.randint(2, 4), known)
        restored = [update for word, update in known if word == "restored"]
        # Every rank reads the same update, none before the newest that was reported as saved.
        if len(set(restored)) > 1 or min(restored, default=0) < newest:
            lost.append([number, newest, restored])
        lost += [line for line in known if line[0] == "lost" or line[0].startswith("skipped")]
        newest = max([newest, *restored, *(update for word, update in known if word == "saved")])
    failed = []
    start(folder, num_kills, rng, 4, failed, full_rank=2)
    newest = max(newest, *(update for word, update in failed if word == "restored"))
    errors = [[word, number] for word, number in failed if ":" in word]
    left = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    print(json.dumps({"hits": hits, "newest": newest, "lost": lost, "errors": errors, "left": left}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
