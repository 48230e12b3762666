"""Simulate what one rank of a cluster does in a round beside its tensors: time, memory and traffic by stage.

    python tools/simulate_cluster.py [--ranks 1024] [--responses 4096] [--tokens 8192] [--json]

The first rank of the run is simulated in one process: the round's own code draws, renders, verifies,
schedules, aligns, collates and counts. Generation, forward passes and gradients are stand-ins that return
constants, and the other ranks send what they would send; making that is not counted. A stage's seconds are
CPU seconds of this process: without the network, whose share follows from the bytes and the number of
collectives. `peak` is the resident memory in a stage beyond that before the first round, `held` what remains.
The second of two rounds is measured; samples for the report, which a run takes in 5 % of its updates, are
taken in it.

Ranks are in copies of the student of `--tensor` ranks each, and on machines of 8.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

STAGES = (
    "draw", "rollouts", "verify", "schedule", "align", "teachers", "prior policy", "advantages", "weights",
    "micro-batches", "report", "update",
)  # fmt: skip
MACHINE = 8


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder:
        result = simulate(arguments, Path(folder))
    print(json.dumps(result) if arguments.json else table(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--tensor", type=int, default=1, help="ranks of one copy of the student")
    parser.add_argument("--responses", type=int, default=4096, help="of a round, four for each prompt")
    parser.add_argument("--tokens", type=int, default=8192, help="mean length of a response")
    parser.add_argument("--teachers", type=int, default=10, help="the last one has another tokenizer")
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    arguments = parser.parse_args()
    if arguments.ranks % arguments.tensor:
        parser.error(f"copies of {arguments.tensor} ranks do not divide {arguments.ranks} ranks")
    return arguments


@dataclass
class Stage:
    """Costs of a stage: own seconds, resident bytes beyond those before the round, and traffic."""

    seconds: float = 0.0
    peak_bytes: int = 0
    held_bytes: int = 0
    collectives: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0


@dataclass
class Meter:
    """Attributes the time, memory and traffic of a round to its stages; a stage inside another is not its."""

    ranks: Any
    stages: dict[str, Stage] = field(default_factory=lambda: {name: Stage() for name in STAGES})
    _stack: list[str] = field(default_factory=list, init=False)
    _since: float = field(default=0.0, init=False)
    _before: int = field(init=False)

    def __post_init__(self) -> None:
        self._before = _resident("VmRSS")

    def clear(self) -> None:
        self.stages.update({name: Stage() for name in STAGES})

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._close()
        self._stack.append(name)
        try:
            yield
        finally:
            self._close()
            self._stack.pop()

    def wrap(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            with self.stage(name):
                return work(*arguments, **named)

        return wrapped

    def _close(self) -> None:
        """Charge what has passed since the last call to the innermost stage."""
        from cluster.stand_ins import Traffic

        now = time.process_time() - self.ranks.outside_s
        if self._stack:
            stage, traffic = self.stages[self._stack[-1]], self.ranks.traffic
            stage.seconds += now - self._since
            stage.peak_bytes = max(stage.peak_bytes, _resident("VmHWM") - self._before)
            stage.held_bytes = _resident("VmRSS") - self._before
            stage.collectives += traffic.collectives
            stage.sent_bytes += traffic.sent
            stage.received_bytes += traffic.received
        self.ranks.traffic = Traffic()
        Path("/proc/self/clear_refs").write_text("5")  # begin a new peak
        self._since = time.process_time() - self.ranks.outside_s


def _resident(name: str) -> int:
    """Return resident memory (VmRSS) or its peak (VmHWM), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def simulate(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run two rounds of one rank; return the stages of the second."""
    import torch
    from cluster.job import write_job
    from cluster.stand_ins import SimulatedCommunicator

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    samples = 4
    recipe = write_job(
        folder,
        teachers=arguments.teachers,
        prompts=arguments.responses // samples,
        samples=samples,
        tokens=arguments.tokens,
        rounds=2,
    )
    ranks = SimulatedCommunicator(0, arguments.ranks, MACHINE)
    trainer = build_trainer(recipe, arguments, ranks)
    meter = Meter(ranks)
    with ExitStack() as opened:
        for target, name, stage in targets_of_patches():
            opened.enter_context(patch.object(target, name, meter.wrap(stage, getattr(target, name))))
        play(trainer, ranks, meter, arguments.tensor)
    trainer.pipeline.close()
    total = {
        "seconds": sum(stage.seconds for stage in meter.stages.values()),
        "peak_bytes": max(stage.peak_bytes for stage in meter.stages.values()),
        "received_bytes": sum(stage.received_bytes for stage in meter.stages.values()),
        "collectives": sum(stage.collectives for stage in meter.stages.values()),
    }
    sizes = {
        name: getattr(arguments, name) for name in ("ranks", "tensor", "responses", "tokens", "teachers")
    }
    return {**sizes, "stages": {name: asdict(stage) for name, stage in meter.stages.items()}, "total": total}


def build_trainer(recipe: Path, arguments: argparse.Namespace, ranks: Any) -> Any:
    """Compose the recipe's run with stand-ins for the student, the teachers and the rollout engine."""
    import torch
    from cluster.job import LETTERS
    from cluster.stand_ins import SimulatedEngine, SimulatedStudent, SimulatedTeacher, placement

    from mergeopd.engine.build import build
    from mergeopd.engine.clock import Clock
    from mergeopd.engine.interrupt import Interrupt
    from mergeopd.engine.models import Machine, Models, build_views
    from mergeopd.preflight.inputs import preflight
    from mergeopd.reporting.events import Reporters
    from mergeopd.teacher.snapshots import StudentSnapshots

    inputs = preflight(recipe)
    machine = Machine(torch.device("cpu"), ranks)
    vocab = range(inputs.vocab_size)
    teachers: dict[str, Any] = {
        name: SimulatedTeacher(name, ranks, renderer.vocab_size) for name, renderer in inputs.teachers.items()
    }
    models = Models(
        inputs=inputs,
        machine=machine,
        student=cast(Any, SimulatedStudent(placement(0, arguments.ranks, arguments.tensor), vocab)),
        snapshots=StudentSnapshots((), lambda: iter(()), lambda: iter(())),
        teachers=teachers,
        views=build_views(inputs, machine, lambda text: None),
    )
    letters = inputs.student.tokenizer.encode(" ".join(LETTERS))[::2]
    engine = {
        "local": lambda source, context, settings: SimulatedEngine(ranks, context, arguments.tokens, letters)
    }
    return build(models, reporter=Reporters(), clock=Clock(), interrupt=Interrupt(), engines=engine)


def targets_of_patches() -> list[tuple[Any, str, str]]:
    """Return the functions that make up a round, by owner and name, with the stage that each belongs to."""
    from mergeopd.engine import score
    from mergeopd.engine.pipeline import SynchronousPipeline
    from mergeopd.engine.prior_policy import PriorPolicy
    from mergeopd.engine.rollouts import Rewards, StudentRollouts
    from mergeopd.engine.samples import SampleTaker
    from mergeopd.engine.score import Scorer
    from mergeopd.engine.teacher_rollouts import FixedText
    from mergeopd.engine.update import Updater

    return [
        (FixedText, "tasks", "draw"),
        (StudentRollouts, "generate", "rollouts"),
        (Rewards, "of", "verify"),
        (SynchronousPipeline, "work", "schedule"),
        (Scorer, "align", "align"),
        (Scorer, "fill", "teachers"),
        (PriorPolicy, "score", "prior policy"),
        (score, "outcomes", "advantages"),
        (Updater, "prepare", "weights"),
        (Updater, "accumulate_gradients", "micro-batches"),
        (SampleTaker, "events", "report"),
        (Updater, "step", "update"),
    ]


def play(trainer: Any, ranks: Any, meter: Meter, tensor: int) -> None:
    """Run two rounds; the meter keeps the stages of the second."""
    from mergeopd.engine.progress import Progress

    trainer.pipeline.trained(0)
    progress = Progress()
    for _ in range(2):
        meter.clear()
        progress = play_round(trainer, ranks, progress, tensor)


def play_round(trainer: Any, ranks: Any, progress: Any, tensor: int) -> Any:
    """Run a round, all of whose updates take samples for the report; return the progress after it."""
    from cluster.stand_ins import peers

    before = progress
    collected = trainer.pipeline.next(progress)
    with peers(ranks, Peers(ranks, tensor, collected)), trainer.scorer.score(collected) as scored:
        for update in collected.work.updates:
            with patch("mergeopd.engine.update.is_due", lambda number, num: True):
                progress = trainer.updater.step(scored, update, progress)
    drawn = before.drawn + collected.phase.prompts_per_round
    return replace(progress, round=before.round + 1, drawn=drawn)


@dataclass(frozen=True)
class Peers:
    """What other ranks send in the collectives of a round: that of this rank, about their own rollouts."""

    ranks: Any
    tensor: int
    collected: Any

    def __call__(self, rank: int, own: Any) -> Any:
        import torch

        from mergeopd.engine.samples import choose
        from mergeopd.teacher.hidden_cache import SpillSlot

        work, rollouts = self.collected.work, self.collected.rollouts
        mine = [i for i, copy in work.copy_of.items() if copy * self.tensor == rank]
        match own:
            case () | (((str(), int()), SpillSlot()), *_):
                teacher = self.ranks.teacher
                scored = (i for i, scorer in work.scorer_of.items() if scorer == rank)
                return tuple(
                    ((teacher, i), SpillSlot("/dev/zero", 0, (rollouts[i].num_trained, 1), torch.float32))
                    for i in scored
                    if teacher in rollouts[i].teacher_set
                )
            case (dict(), dict(), dict(), dict()):
                chosen = choose(rollouts, range(len(rollouts)))
                return self._samples([i for i in mine if i in chosen])
            case _:
                return own

    def _samples(self, chosen: Sequence[int]) -> Any:
        """Return the statistics of some responses for the report."""
        from mergeopd.engine.samples import _Top
        from mergeopd.reporting.events import TeacherTrace

        parts: tuple[dict[Any, Any], ...] = ({}, {}, {}, {})
        for i in chosen:
            rollout = self.collected.rollouts[i]
            num, (name,) = rollout.num_trained, rollout.teacher_set
            numbers = tuple(-0.5 + n / num for n in range(num))
            top = _Top([[n % 90, 5, 7] for n in range(num)], [[x, x, x] for x in numbers], [0.5] * num)
            parts[0][i], parts[1][i] = numbers, {name: TeacherTrace(numbers, numbers, ())}
            parts[2][i], parts[3][i, name] = {0: top}, {0: top}
        return parts


def table(result: Mapping[str, Any]) -> str:
    """Format a line per stage."""
    heading = ("seconds", "peak MB", "held MB", "collectives", "sent MB", "received MB")
    lines = [
        f"{result['ranks']} ranks, {result['responses']} responses of {result['tokens']} tokens, "
        f"{result['teachers']} teachers",
        f"{'':>14}" + "".join(f"{name:>13}" for name in heading),
    ]
    for name, stage in result["stages"].items():
        numbers = [
            f"{stage['seconds']:.3f}",
            *(f"{stage[key] / 1e6:.1f}" for key in ("peak_bytes", "held_bytes")),
            f"{stage['collectives']}",
            *(f"{stage[key] / 1e6:.2f}" for key in ("sent_bytes", "received_bytes")),
        ]
        lines.append(f"{name:>14}" + "".join(f"{number:>13}" for number in numbers))
    total = result["total"]
    lines.append(
        f"total {total['seconds']:.2f} s, peak {total['peak_bytes'] / 1e6:.0f} MB, received "
        f"{total['received_bytes'] / 1e6:.0f} MB in {total['collectives']} collectives"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
