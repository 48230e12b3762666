"""One rank that publishes a student's weights and then unshards it; writes by how much each raised its peak memory."""

import datetime
import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

warnings.filterwarnings("ignore")

from mergeopd.distributed.communicator import TorchCommunicator  # noqa: E402
from mergeopd.recipe.training import Optimizer  # noqa: E402
from mergeopd.storage import published_weights  # noqa: E402
from mergeopd.storage.published_weights import PublishedWeights  # noqa: E402
from mergeopd.student.megatron.grid import Grid  # noqa: E402
from mergeopd.student.megatron.step import MegatronStudent  # noqa: E402


def resident(key):
    """Bytes of this process in memory now (VmRSS), or at most since `raised_by` began (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def raised_by(action):
    """Return by how many bytes the peak of resident memory exceeds what was resident before."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before


def unshard(student):
    with student.unsharded():
        pass


def main(rank, world, store, out, model, folder, max_file_bytes):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout
    )
    grid = Grid.open(tensor=world, pipeline=1)
    student = MegatronStudent(
        Path(model),
        dtype="float32",
        num_valid=4000,
        optimizer=Optimizer(),
        grid=grid,
        device=torch.device("cpu"),
    )
    published = PublishedWeights(Path(folder), Path(model), TorchCommunicator("here"))
    published_weights._MAX_FILE_BYTES = max_file_bytes
    for parameter in student._model.parameters():  # as an update would
        parameter.data.mul_(1.5)
    peaks = {
        "published": raised_by(lambda: published.publish(student, 1)),
        "published again": raised_by(lambda: published.publish(student, 2)),
        "unsharded": raised_by(lambda: unshard(student)),
    }
    Path(out).write_text(json.dumps(peaks))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:7], int(sys.argv[7]))
