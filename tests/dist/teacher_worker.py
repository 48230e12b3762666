"""One rank of `test_teacher_ranks.py`: writes the data that it gathered, sent and read to a JSON file."""

import contextlib
import datetime
import json
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mergeopd.distributed.communicator import TorchCommunicator, this_machine
from mergeopd.errors import MergeopdError
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.teacher import shared_cache as node_cache
from mergeopd.teacher.local import TeacherSource, TeacherStore
from mergeopd.teacher.protocol import TeacherSequence
from mergeopd.teacher.shared_cache import SharedHiddenCache
from mergeopd.teacher.weight_reader import ShardedReader

CPU = torch.device("cpu")
NUM_ROLLOUTS = 11
TEACHERS = {"a": (torch.float32, 6), "b": (torch.bfloat16, 5), "c": (torch.float64, 3)}
# Machine of each rank, and the loss_ranks of even and odd rollouts.
LAYOUTS = {
    "one machine": ("mmmm", ({0, 1}, {2, 3})),
    "stages apart": ("aabb", ({2, 3}, {2, 3})),
    "copies apart": ("aabb", ({0, 1}, {2, 3})),
    "groups across": ("abab", ({0, 1}, {2, 3})),
    "all apart": ("abcd", ({1, 3}, {2})),
    "three machines": ("abbc", ({1, 2, 3}, {0, 2})),
}
GENEROUS = 1 << 30
SMALL_BYTES = 24


class Counted(TorchCommunicator):
    """Communicator that records what it sends."""

    def __init__(self, machine):
        super().__init__(machine)
        self.sent = []

    def send(self, tensor, rank):
        self.sent.append((rank, tensor.numel() * tensor.element_size()))
        super().send(tensor, rank)


def states(teacher, rollout):
    dtype, width = TEACHERS[teacher]
    g = torch.Generator().manual_seed(1000 * ord(teacher) + rollout)
    return torch.randn(rollout % 4, width, generator=g, dtype=torch.float64).to(dtype)


def scorer(teacher, rollout):
    return (rollout * 7 + ord(teacher)) % 4


def same(actual, expected):
    return actual.dtype == expected.dtype and torch.equal(actual, expected)


def attempt(work):
    """Class and message of the error that `work` raises."""
    try:
        work()
    except (MergeopdError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def one_round(ranks, loss_ranks, budget_bytes, folder):
    """Publish the states of three teachers; read all states of this rank after each."""
    right, refused = [], []
    with SharedHiddenCache(
        budget_bytes, folder, ranks, lambda rollout: loss_ranks[rollout % 2], CPU
    ) as cache:
        own = [i for i in range(NUM_ROLLOUTS) if ranks.rank in loss_ranks[i % 2]]
        others = [i for i in range(NUM_ROLLOUTS) if ranks.rank not in loss_ranks[i % 2]]
        published = []
        for teacher in TEACHERS:
            for rollout in range(NUM_ROLLOUTS):
                if scorer(teacher, rollout) == ranks.rank:
                    cache.put(teacher, rollout, states(teacher, rollout))
            cache.publish()
            published.append(teacher)
            for known in published:
                for order in (own, own[::-1], own[:1] * 3):
                    if order:
                        expected = torch.cat([states(known, i) for i in order])
                        right.append(same(cache.gather(known, order), expected))
        refused = [attempt(lambda i=i: cache.gather("a", [i])) for i in others]
        held = cache.num_bytes, cache.num_spilled_bytes
    return {"right": right, "refused": refused, "held": held, "sent": ranks.sent}


def leaving_early(folder):
    """Rank 0 leaves as soon as it has published; others gather what it scored."""
    ranks = TorchCommunicator("m")
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(SharedHiddenCache(100, folder, ranks, lambda rollout: {0, 1, 2, 3}, CPU))
        if ranks.rank == 0:
            for rollout in range(NUM_ROLLOUTS):
                cache.put("a", rollout, states("a", rollout))
        cache.publish()
        if ranks.rank == 0:
            stack.close()
        ranks.gather(None)
        order = list(range(NUM_ROLLOUTS))
        if ranks.rank == 0:
            return cache.num_spilled_bytes > 0
        return same(cache.gather("a", order), torch.cat([states("a", i) for i in order]))


def scored_twice(folder):
    ranks = TorchCommunicator("m")
    with SharedHiddenCache(GENEROUS, folder, ranks, lambda rollout: {0}, CPU) as cache:
        if ranks.rank in (1, 3):
            cache.put("a", 5, states("a", 5))
        return attempt(cache.publish)


def full_disk(folder):
    """Fill the disk of rank 2, which receives states; the message that follows must not be lost."""
    ranks = TorchCommunicator("ab"[ranks_half()])
    blocked = folder / "blocked"
    if ranks.rank == 2:
        blocked.write_text("a file where the folder should be")
    own = blocked if ranks.rank == 2 else folder / "free"
    with SharedHiddenCache(0, own, ranks, lambda rollout: {2 + rollout % 2}, CPU) as cache:
        if ranks.rank < 2:
            for rollout in range(ranks.rank, NUM_ROLLOUTS, 2):
                cache.put("a", rollout, states("a", rollout))
        return attempt(cache.publish)


def ranks_half():
    return dist.get_rank() // 2


def caches(folder):
    result = {}
    for name, (machines, loss_ranks) in LAYOUTS.items():
        for budget_bytes in (0, 300, GENEROUS):
            ranks = Counted(machines[dist.get_rank()])
            result[f"{name}|{budget_bytes}"] = one_round(ranks, loss_ranks, budget_bytes, folder / "spill")
    node_cache._PARCEL_BYTES = SMALL_BYTES
    ranks = Counted("aabb"[dist.get_rank()])
    result["small parcels"] = one_round(ranks, LAYOUTS["stages apart"][1], 300, folder / "spill")
    return {
        "rounds": result,
        "left": [str(p) for p in (folder / "spill").iterdir()],
        "early": leaving_early(folder / "spill"),
        "twice": scored_twice(folder / "spill"),
        "full": full_disk(folder),
        "machines": TorchCommunicator(this_machine()).num_local,
    }


def read_in_parts(model, dtype, batch_bytes):
    """Bytes that this rank read and reported, and whether body and hidden states equal those of mapped files."""
    ranks = TorchCommunicator("m")
    sources = {"t": TeacherSource(model, dtype, 37)}
    mapped = TeacherStore(sources, CPU)
    sharded = TeacherStore(sources, CPU, ShardedReader(ranks, batch_bytes))
    counted, read_into = [], Checkpoint.read_into

    def counting(self, name, start, buffer):
        counted.append(len(buffer))
        read_into(self, name, start, buffer)

    Checkpoint.read_into = counting
    try:
        # Stores have their own skeletons, so both teachers can be in memory.
        with sharded.open("t") as teacher, mapped.open("t") as whole:
            actual, expected = teacher.body.state_dict(), whole.body.state_dict()
            right = actual.keys() == expected.keys()
            right = right and all(same(actual[n], expected[n]) for n in expected)
            ids = [TeacherSequence((1, 2, 3), (4, 5))], 100
            rows = [dict(t.hidden(*ids))[0] for t in (teacher, whole)]
            right = right and same(*rows)
        with sharded.open("t"):
            twice = sharded.bytes_read("t")
    finally:
        Checkpoint.read_into = read_into
    header = Checkpoint.open(model).header_bytes
    return {
        "right": right,
        "read": sum(counted),
        "reported": twice - 2 * header,
        "mapped": mapped.bytes_read("t") - header,
        "reads": len(counted),
    }


def odd_files(folder, model):
    """Truncate rank 1's copy after it was opened; give rank 2 the files of another model."""
    ranks, result = TorchCommunicator("m"), {}
    for case in ("cut", "other"):
        own = folder / f"{case}{ranks.rank}"
        shutil.copytree(model, own)
        [file] = own.glob("*.safetensors")
        if case == "other" and ranks.rank == 2:
            with file.open("r+b") as opened:
                opened.seek(-1, 2)
                opened.write(b"!")
        store = TeacherStore({"t": TeacherSource(own, "float32", 37)}, CPU, ShardedReader(ranks))
        store.fingerprint("t")
        if case == "cut" and ranks.rank == 1:
            with file.open("r+b") as opened:
                opened.truncate(2000)

        def turn(store=store):
            with store.open("t"):
                pass

        result[case] = attempt(turn).replace(str(folder), "")
    return result


def main(rank, world, store, out, folder, *models):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    report = {"caches": caches(Path(folder))}
    report["reads"] = {
        f"{Path(model).name}|{dtype}|{batch_bytes}": read_in_parts(Path(model), dtype, batch_bytes)
        for model in models
        for dtype in ("float32", "bfloat16")
        for batch_bytes in (1, 20_000, 1 << 28)
    }
    report["odd"] = odd_files(Path(folder), Path(models[0]))
    Path(out).write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
