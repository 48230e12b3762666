"""One rank of runs on grids: the engine's own way from recipe to result, for one job after another.

A job is a JSON object: `name`, `recipe`, `overrides`, and where wanted `max_updates`, `machines` (a name for
every rank), `stop` ({"rank", "call", "stage"}: who gets SIGTERM when which part of a stage begins), `round` (a file of rollouts
and rewards: the gradient of one round instead of a run), `copied` (a run folder and its copy, made before).
The results of a rank are written to OUT.
"""

import datetime
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import traceback
import warnings
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
warnings.filterwarnings("ignore")

from mergeopd.engine.build import Machine, load_models  # noqa: E402
from mergeopd.engine.stages import Stages  # noqa: E402
from mergeopd.engine.clock import Clock  # noqa: E402
from mergeopd.engine.run import claim, train  # noqa: E402
from mergeopd.preflight.inputs import preflight  # noqa: E402
from mergeopd.errors import MergeopdError  # noqa: E402
from mergeopd.distributed.communicator import SingleProcess, TorchCommunicator  # noqa: E402

# What a run imports when it needs it; here before the ranks are forked.
for _name in ("mergeopd.student.megatron.step", "transformers.models.qwen3.modeling_qwen3", "grid_jobs"):
    importlib.import_module(_name)

DEADLINE = datetime.timedelta(seconds=60)


def whole_run(job, ranks):
    """`mergeopd run`, but for opening the group."""
    with ExitStack() as held:
        inputs = claim(Path(job["recipe"]), job["overrides"], (), ranks, held)
        if inputs is not None:
            train(inputs, Clock(), job.get("max_updates"), ranks)


def stopping(stage, at):
    """A signal to this process when number `at` (from 0) of this stage's parts begins."""
    true, calls = Stages.begin, []

    def begin(self, name, detail, *arguments):
        if name == stage and detail != "verifying":
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGTERM)
            calls.append(None)
        return true(self, name, detail, *arguments)

    return mock.patch.object(Stages, "begin", begin)


def one_round(job, ranks, out):
    """The raw gradients of a round's updates, on rank 0."""
    from enumeration import engine_round

    rollouts, grades = torch.load(job["round"], weights_only=False)
    parts = load_models(preflight(Path(job["recipe"]), job["overrides"]), Machine(torch.device("cpu"), ranks))
    found = engine_round(parts, rollouts, grades)
    torch.save([gradient for gradient, _ in found], out.with_name(f"{out.stem}.{job['name']}.gradients"))
    return [stats.loss for _, stats in found]


def told(job, rank, world, out):
    """What became of a job on this rank."""
    from megatron.core import parallel_state

    machines = job.get("machines", ["here"] * world)
    ranks = SingleProcess() if world == 1 else TorchCommunicator(machines[rank])
    stop = job.get("stop", {"rank": None})
    found = {"error": None}
    try:
        with ExitStack() as held:
            if stop["rank"] == rank:
                held.enter_context(stopping(stop.get("stage", "rollout"), stop["call"]))
            if "round" in job:
                found["losses"] = one_round(job, ranks, out)
            else:
                whole_run(job, ranks)
    except MergeopdError as error:
        found["error"] = f"{type(error).__name__}: {error}"
    except Exception:
        traceback.print_exc()
        raise
    finally:
        parallel_state.destroy_model_parallel()
    return found


def main(rank, world, store, out, jobs):
    torch.set_num_threads(1)
    found = {}
    for number, job in enumerate(json.loads(Path(jobs).read_text())):
        print(job["name"], flush=True)
        # Groups of their own for every job: those of gloo have threads that wake up a hundred times a second.
        where = f"file://{store}-{number}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world, timeout=DEADLINE)
        if rank == 0 and "copied" in job:
            shutil.copytree(*job["copied"])
        dist.barrier()
        found[job["name"]] = told(job, rank, world, Path(out))
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6])
