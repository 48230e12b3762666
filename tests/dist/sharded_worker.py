"""One rank of the tests of the sharded torch student: a list of cases on one grid, writes the results to a file."""

import datetime
import importlib
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
warnings.filterwarnings("ignore")

from safetensors.torch import load_file  # noqa: E402
from states import HeldTensors  # noqa: E402

from mergeopd.errors import MergeopdError  # noqa: E402
from mergeopd.student.loss import Measured  # noqa: E402
from mergeopd.student.shard_grid import ShardGrid  # noqa: E402
from mergeopd.student.torch import TorchStudent  # noqa: E402

# Imported before the ranks are forked.
for _name in ("torch.distributed.fsdp", "mergeopd.models.causal", "transformers.models.auto.modeling_auto"):
    importlib.import_module(_name)

CPU = torch.device("cpu")


def error_text(action):
    try:
        action()
    except (MergeopdError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def own_micro_batches(micro_batches):
    """Every rank's share: uneven counts, and none for some ranks if there are few."""
    return micro_batches[dist.get_rank() :: dist.get_world_size()]


def training(case, student):
    """Losses of this rank and norms of the updates, the first raw gradient."""
    losses, norms, gradients = [], [], {}
    for number, (micro_batches, lr) in enumerate(zip(case["updates"], case["lrs"], strict=True)):
        mine = own_micro_batches(micro_batches)
        # Two calls add up like one.
        parts = [mine[:1], mine[1:]] if case["split"] else [mine]
        stats = [s for part in parts for s in student.accumulate_gradients(part, case["objective"])]
        losses.append(sum(float(s.loss.sum()) for s in stats))
        if number == 0:
            gradients = {name: g.clone() for name, g in student.gradients().items()}
        norms.append(student.optimizer_step(lr))
    return {"losses": losses, "norms": norms, "gradients": gradients}


def made(case, grid):
    return TorchStudent(
        case["folder"],
        dtype=case["dtype"],
        num_valid=case["num_valid"],
        optimizer=case["optimizer"],
        device=CPU,
        grid=grid,
    )


def failures(case, grid):
    """Errors of this rank when one rank has a teacher with NaN, or an infinite gradient."""
    student = made(case, grid)
    before = {name: w.clone() for name, w in student.weights()}
    mine = own_micro_batches(case["updates"][0])
    if dist.get_rank() == dist.get_world_size() - 1:
        mine[0].targets[0].head.weight[2] = torch.nan
    result = {"teacher": error_text(lambda: student.accumulate_gradients(mine, case["objective"]))}
    if dist.get_rank() == 0:
        next(iter(student._weights.masters.values())).grad[0] = torch.inf
    result["gradient"] = error_text(lambda: student.optimizer_step(0.1))
    result["state"] = error_text(
        lambda: student.load_state(HeldTensors({"master.model.norm.weight": torch.zeros(48)}))
    )
    result["unchanged"] = all(torch.equal(w, before[name]) for name, w in student.weights())
    return result


def run(case, grid):
    folder = Path(case["export"])
    if case["fails"]:
        return failures(case, grid)
    student = made(case, grid)
    if case["state"] is not None:
        student.load_state(HeldTensors(load_file(case["state"])))
    result = {"own": sum(p.numel() for p in student._weights.masters.values())}
    what = Measured(case["objective"].divergences, None, 1.0)
    scored = student.score(own_micro_batches(case["updates"][0]), what)
    result["scores"] = [s.logprob_S for s in scored]
    if case["state"] is None:
        student.export(folder / "untouched")
    result |= training(case, student)
    result["state"] = [replace(part, tensor=part.tensor.clone()) for part in student.state()]
    with student.unsharded() as (body, head):
        ids = torch.tensor([[1, 2, 3, 4, 5]])
        with torch.no_grad():
            result["logits"] = body(input_ids=ids).last_hidden_state @ head.weight.T
    student.export(folder / "trained")
    return result


def main(rank, world, store, out, jobs, shard):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=120),
    )
    grid = ShardGrid.open(shard, CPU)
    cases = torch.load(jobs, weights_only=False)
    torch.save({name: run(case, grid) for name, case in cases.items()}, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6], int(sys.argv[6]))
