"""One rank of `test_streamed_ranks.py`: scores with streamed teachers and writes what it saw to a JSON file."""

import datetime
import json
import shutil
import sys
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist

from mergeopd.distributed.communicator import CollectiveAbort, TorchCommunicator
from mergeopd.models.residency import Held
from mergeopd.teacher.local import LocalTeacher, TeacherSource, TeacherStore
from mergeopd.teacher.protocol import LOCAL, TargetSpec, TeacherSequence
from mergeopd.teacher.weight_reader import ShardedReader

CPU = torch.device("cpu")
# The shares of two ranks: other numbers of batches and passes, and none.
SHARES = {
    "equal": ((0, 1), (2, 3)),
    "unequal": ((0, 1, 2), (3,)),
    "one has none": ((), (0, 1, 2, 3)),
}
SEQUENCES = [TeacherSequence((1, 2, 3), tuple(range(4, 8 + 3 * i))) for i in range(4)]
SPECS = {"hidden": TargetSpec("hidden"), "top_k": TargetSpec("top_k", 1.0, 3)}


class Stopped(CollectiveAbort):
    pass


def teacher_of(model, dtype, pass_tokens, reader=None):
    store = TeacherStore({"t": TeacherSource(model, dtype, 37)}, CPU, reader)
    held = Held(pass_tokens, 0, "of the test")
    return store, LocalTeacher("t", store, LOCAL, None, lambda work: work(), None, held)


def scored(teacher, sequences, spec):
    with teacher.open() as session:
        return dict(session.score(sequences, spec, 16))


def compare(ranks, model, dtype, share, pass_tokens, spec):
    """Whether a rank's results are those of the resident teacher, and the bytes that it read."""
    own = [SEQUENCES[i] for i in SHARES[share][ranks.rank]]
    _, resident = teacher_of(model, dtype, None)
    expected = scored(resident, own, SPECS[spec])
    store, streamed = teacher_of(model, dtype, pass_tokens, ShardedReader(ranks))
    rows = scored(streamed, own, SPECS[spec])
    is_right = rows.keys() == expected.keys() and all(torch.equal(rows[i], expected[i]) for i in expected)
    if spec == "top_k":
        head = store.head("t").weight.nbytes
        return {"right": is_right and head > 0}
    return {"right": is_right, "read": store.bytes_read("t")}


def failing(ranks, model, folder, case):
    """The error of this rank when rank 1 fails in the given way; then a collective that must still work."""
    own = folder / f"{case}{ranks.rank}"
    shutil.copytree(model, own)
    [file] = own.glob("*.safetensors")
    if case == "other files" and ranks.rank == 1:
        with file.open("r+b") as opened:
            opened.seek(-1, 2)
            opened.write(b"!")
    _, teacher = teacher_of(own, "float32", 16, ShardedReader(ranks))
    if case == "truncated" and ranks.rank == 1:
        teacher.fingerprint  # noqa: B018 - computed from the whole file
        with file.open("r+b") as opened:
            opened.truncate(20_000)

    def work():
        with closing(session.score(SEQUENCES, SPECS["hidden"], 16)) as rows:
            for _ in rows:
                if case == "consumer fails" and ranks.rank == 1:
                    raise OSError("disk full")
                if case == "consumer stops" and ranks.rank == 1:
                    raise Stopped

    try:
        with teacher.open() as session:
            ranks.run_and_gather(work)
        error = None
    except Exception as raised:  # noqa: BLE001
        error = f"{type(raised).__name__}: {raised}"
    return {"error": error, "gathered": ranks.gather(ranks.rank)}


def main(rank, world, store, out, folder, *models):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    ranks = TorchCommunicator("m")
    report = {
        f"{Path(model).name}|{dtype}|{share}|{pass_tokens}|{spec}": compare(
            ranks, Path(model), dtype, share, pass_tokens, spec
        )
        for model in models
        for dtype in ("float32", "bfloat16")
        for share in SHARES
        for pass_tokens in (16, 1000)
        for spec in SPECS
    }
    cases = ("other files", "truncated", "consumer fails", "consumer stops")
    failures = {case: failing(ranks, Path(models[0]), Path(folder), case) for case in cases}
    Path(out).write_text(json.dumps({"scored": report, "failures": failures}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
