"""One rank of the Megatron tests: a list of cases on one grid, writes the results to a file."""

import datetime
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
warnings.filterwarnings("ignore")

from fused_norms import FusedParts  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from states import HeldTensors  # noqa: E402

from mergeopd.errors import MergeopdError  # noqa: E402
from mergeopd.loss import Head, Hidden  # noqa: E402
from mergeopd.storage.boxes import Box  # noqa: E402
from mergeopd.student.loss import Measured  # noqa: E402
from mergeopd.student.megatron import specs, weights  # noqa: E402
from mergeopd.student.megatron.grid import Grid  # noqa: E402
from mergeopd.student.megatron.step import MegatronStudent  # noqa: E402

CPU = torch.device("cpu")


def rows_of(head, vocab):
    part = slice(vocab.start, vocab.stop)
    return Head(head.weight[part], None, head.scale, head.softcap, len(vocab), vocab.start)


def own_part(micro, student, grid):
    """Reduce a micro-batch to the data of this rank: its rows of the teachers' heads on the last stage, else tokens."""
    if not grid.is_last_stage:
        nothing = torch.full_like(micro.nll_weight_N, torch.nan)
        return replace(
            micro, teachers=(), targets=(), teacher_weight_KN=nothing, nll_weight_N=nothing, policy=None
        )
    return replace(
        micro, targets=tuple(Hidden(t.hidden, rows_of(t.head, student.vocab)) for t in micro.targets)
    )


def own_micro_batches(micro_batches, student, grid):
    """Every `data`-th micro-batch: uneven counts, and none for some ranks if there are few."""
    return [own_part(m, student, grid) for m in micro_batches[grid.data_rank :: grid.data]]


def error_text(action):
    try:
        action()
    except (MergeopdError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def training(case, student, grid):
    """Losses (this rank's own_micro_batches, 0 where another has it) and norms of the updates, the first raw gradient."""
    losses, norms, gradients, calls, observed = [], [], {}, [], []
    student._model.decoder.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for number, (micro_batches, lr) in enumerate(zip(case["updates"], case["lrs"], strict=True)):
        mine = own_micro_batches(micro_batches, student, grid)
        # Two calls add up like one.
        parts = [mine[:1], mine[1:]] if case["split"] else [mine]
        stats = []
        for part in parts:
            stats += student.accumulate_gradients(
                part, case["objective"], lambda micro, _: observed.append(len(micro.rollouts))
            )
        counts = student.placement.reports_stats
        losses.append(sum(float(s.loss.sum()) for s in stats) if counts else 0.0)
        if number == 0:
            gradients = {name: g.clone() for name, g in student.gradients().items()}
        norms.append(student.optimizer_step(lr))
    return {
        "losses": losses,
        "norms": norms,
        "gradients": gradients,
        "calls": len(calls),
        "observed": observed,
    }


def scores(case, student, grid):
    """Log-probability and entropy of the first update's tokens, on ranks that have them."""
    what = Measured(case["objective"].divergences, None, 1.0)
    stats = student.score([own_part(m, student, grid) for m in case["updates"][0]], what)
    return [{"logprob": s.logprob_S, "entropy": s.entropy_S, "divergence": s.divergence} for s in stats]


def state_again(path, student):
    """Load the state of another student's file; whether the state is the same bit for bit."""
    given = load_file(path)
    student.load_state(HeldTensors(given))
    whole = {name: Box.full(tuple(tensor.shape)) for name, tensor in given.items()}
    return all(torch.equal(p.tensor, given[p.name][p.box.within(whole[p.name])]) for p in student.state())


def failures(case, student, grid):
    """Errors of this rank when one rank has a teacher with NaN, or an infinite gradient."""
    before = {name: w.clone() for name, w in student.shards.items()}
    micro_batches = [own_part(m, student, grid) for m in case["updates"][0]]
    if grid.is_last_stage and grid.data_rank == 0 and grid.tensor_rank == grid.tensor - 1:
        micro_batches[1].targets[0].head.weight[2] = torch.nan
    result = {"teacher": error_text(lambda: student.accumulate_gradients(micro_batches, case["objective"]))}
    if dist.get_rank() == 0:
        next(iter(student._ddp.parameters())).main_grad.fill_(torch.inf)
    result["gradient"] = error_text(lambda: student.optimizer_step(0.1))
    result["summed"] = error_text(lambda: student.accumulate_gradients(micro_batches, case["objective"]))
    result["float64"] = error_text(lambda: made({**case, "dtype": "float64"}, grid))
    result["layers"] = error_text(lambda: made({**case, "layers": "transformer_engine"}, grid))
    result["state"] = error_text(
        lambda: student.load_state(HeldTensors({"master.model.norm.weight": torch.zeros(48)}))
    )
    result["unchanged"] = all(torch.equal(w, before[name]) for name, w in student.shards.items())
    return result


def made(case, grid):
    parts = {"local": FusedParts} if case["fused_norms"] else {}
    with mock.patch.dict(specs.PARTS, parts):
        return student_of(case, grid)


def student_of(case, grid):
    return MegatronStudent(
        case["folder"],
        dtype=case["dtype"],
        num_valid=case["num_valid"],
        optimizer=case["optimizer"],
        grid=grid,
        device=CPU,
        recompute=case["recompute"],
        layers=case.get("layers", "auto"),
    )


def run(case, grid):
    grid = replace(grid, sequence_parallel=case["sequence_parallel"])
    student = made(case, grid)
    result = {"vocab": (student.vocab.start, student.vocab.stop), "stage": grid.stage}
    result["num_weights"] = sum(weight.numel() for weight in student.shards.values())
    if case["fails"]:
        return result | failures(case, student, grid)
    folder = Path(case["export"])
    if case["state"] is not None:
        result["same state"] = state_again(case["state"], student)
        result |= training(case, student, grid)
        result["state"] = [replace(part, tensor=part.tensor.clone()) for part in student.state()]
        return result
    result["fresh state"] = sorted({part.name for part in student.state()})
    result["scores"] = scores(case, student, grid)
    with mock.patch.object(weights, "MAX_FILE_BYTES", 20_000):
        student.export(folder / "untouched")
    result["stream"] = dict(student.folder_weights())
    result |= training(case, student, grid)
    student.export(folder / "trained")
    return result


def main(rank, world, store, out, jobs, sizes):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    grid = Grid.open(**json.loads(sizes))
    cases = torch.load(jobs, weights_only=False)
    torch.save({name: run(case, grid) for name, case in cases.items()}, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:7])
