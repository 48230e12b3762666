"""One rank of runs on grids: runs one job after another with the engine, from recipe to result.

A job is a JSON object: `name`, `recipe`, `overrides`, and where wanted `max_updates`, `machines` (a name for
every rank), `stop` ({"rank", "call", "stage"}: the rank that gets SIGTERM, and at which part of which stage), `round` (a file of rollouts
and rewards: the gradient of one round instead of a run), `copied` (a run folder and its copy, made before), `is_sharded` (no rank
may have the whole student).
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

from mergeopd.distributed.communicator import SingleProcess, TorchCommunicator  # noqa: E402
from mergeopd.engine.clock import Clock  # noqa: E402
from mergeopd.engine.models import Machine, load_models  # noqa: E402
from mergeopd.engine.run import claim, train  # noqa: E402
from mergeopd.engine.stages import Stages  # noqa: E402
from mergeopd.errors import MergeopdError  # noqa: E402
from mergeopd.preflight.inputs import preflight  # noqa: E402

# Modules that a run imports late, imported here before the ranks are forked.
for _name in ("mergeopd.student.megatron.step", "transformers.models.qwen3.modeling_qwen3", "grid_jobs"):
    importlib.import_module(_name)

DEADLINE = datetime.timedelta(seconds=60)


def whole_run(job, ranks):
    """Do what `mergeopd run` does after opening the group."""
    with ExitStack() as held:
        inputs = claim(Path(job["recipe"]), job["overrides"], (), ranks, held)
        if inputs is not None:
            train(inputs, Clock(), job.get("max_updates"), ranks)


def stopping(stage, at):
    """Send SIGTERM to this process when part `at` (from 0) of a stage begins."""
    true, calls = Stages.begin, []

    def begin(self, name, detail, *arguments):
        if name == stage and detail != "verifying":
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGTERM)
            calls.append(None)
        return true(self, name, detail, *arguments)

    return mock.patch.object(Stages, "begin", begin)


def whole_student(*_):
    raise AssertionError("a rank asks for the whole student")


def one_round(job, ranks, out):
    """Save the raw gradients of a round's updates, on rank 0; return the losses."""
    from enumeration import engine_round

    rollouts, grades = torch.load(job["round"], weights_only=False)
    parts = load_models(preflight(Path(job["recipe"]), job["overrides"]), Machine(torch.device("cpu"), ranks))
    result = engine_round(parts, rollouts, grades)
    torch.save([gradient for gradient, _ in result], out.with_name(f"{out.stem}.{job['name']}.gradients"))
    return [stats.loss for _, stats in result]


def run_job(job, rank, world, out):
    """Run a job on this rank; its error, and the losses of a round."""
    from megatron.core import parallel_state

    machines = job.get("machines", ["here"] * world)
    ranks = SingleProcess() if world == 1 else TorchCommunicator(machines[rank])
    stop = job.get("stop", {"rank": None})
    result = {"error": None}
    try:
        with ExitStack() as held:
            if job.get("is_sharded"):
                from mergeopd.student.megatron.step import MegatronStudent

                for name in ("unsharded", "weights", "master_weights"):
                    held.enter_context(mock.patch.object(MegatronStudent, name, whole_student))
            if stop["rank"] == rank:
                held.enter_context(stopping(stop.get("stage", "rollout"), stop["call"]))
            if "round" in job:
                result["losses"] = one_round(job, ranks, out)
            else:
                whole_run(job, ranks)
    except MergeopdError as error:
        result["error"] = f"{type(error).__name__}: {error}"
    except Exception:
        traceback.print_exc()
        raise
    finally:
        parallel_state.destroy_model_parallel()
    return result


def main(rank, world, store, out, jobs):
    torch.set_num_threads(1)
    result = {}
    for number, job in enumerate(json.loads(Path(jobs).read_text())):
        print(job["name"], flush=True)
        # A new group for every job: threads of gloo groups wake up a hundred times a second.
        where = f"file://{store}-{number}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world, timeout=DEADLINE)
        if rank == 0 and "copied" in job:
            shutil.copytree(*job["copied"])
        dist.barrier()
        result[job["name"]] = run_job(job, rank, world, Path(out))
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6])
