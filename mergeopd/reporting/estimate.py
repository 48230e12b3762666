"""Records of what a run costs before it starts: memory, time, teachers, changes. Written as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

VERSION = 1
_SMALLEST = 0.01  # share of the peak below which parts are joined
_OTHER = "other"


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """Bytes of one rank. `where`: in the memory of its device, or in the main memory beside GPUs."""

    name: str
    num_bytes: float
    where: Literal["device", "host"] = "device"


@dataclass(frozen=True, slots=True)
class StageMemory:
    """What a rank has in memory during a stage."""

    stage: str
    parts: tuple[MemoryPart, ...]

    def total(self, where: str = "device") -> float:
        """Return the bytes of the parts in this memory."""
        return sum(part.num_bytes for part in self.parts if part.where == where)


@dataclass(frozen=True, slots=True)
class StageTime:
    """Seconds of a stage per round, by cause; a cause is what a faster machine or less work would shorten."""

    name: str
    causes: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.causes.values())

    @property
    def bound(self) -> str:
        """The largest cause."""
        return max(self.causes, key=lambda cause: self.causes[cause], default="")


@dataclass(frozen=True, slots=True)
class TeacherCost:
    """What one teacher costs in a round: seconds of all ranks together, bytes read, operations, cached bytes.

    `how` says how its weights reach a rank; `runs_not` why mergeopd cannot run it today, if it cannot.
    """

    name: str
    parameters: int
    active: int
    how: str
    responses: float
    seconds: float
    bytes_read: float
    flops: float
    cached_bytes: float
    runs_not: str | None = None


@dataclass(frozen=True, slots=True)
class PhaseEstimate:
    """A phase: seconds of its rounds by stage, and of the text that teachers generate before it begins."""

    name: str
    updates: int
    rounds: int
    responses: float
    tokens: float
    stages: tuple[StageTime, ...]
    teachers: tuple[TeacherCost, ...]
    bytes_read: float
    flops: Mapping[str, float]
    text_s: float

    @property
    def round_s(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def seconds(self) -> float:
        return self.rounds * self.round_s + self.text_s


@dataclass(frozen=True, slots=True)
class Grid:
    """Processes of a student: `tensor` x `pipeline` x `context` hold one of `data` replicas.

    Of a stage's processes, `expert` divide the experts of a mixture.
    """

    tensor: int
    pipeline: int
    data: int
    context: int
    expert: int

    @property
    def size(self) -> int:
        return self.tensor * self.pipeline * self.holders

    def __str__(self) -> str:
        context = f" x context {self.context}" if self.context > 1 else ""
        experts = f" (expert {self.expert})" if self.expert > 1 else ""
        return f"tensor {self.tensor} x pipeline {self.pipeline}{context} x data {self.data}{experts}"

    @property
    def holders(self) -> int:
        """Processes with the same weights, which share the optimizer's state."""
        return self.context * self.data


@dataclass(frozen=True, slots=True)
class Change:
    """Settings that shorten the run, planned again: seconds, and peak memory of a rank."""

    settings: Mapping[str, Any]
    effect: str
    seconds: float
    peak_bytes: float
    fits: bool


@dataclass(frozen=True, slots=True)
class Fitted:
    """A grid and batches that fit, with seconds of the run and peak memory of a rank.

    `streamed` are the teachers that are read layer by layer.
    """

    backend: str
    grid: Grid
    micro_batch_tokens: int
    recompute: bool
    batch_size: int
    seconds: float
    peak_bytes: float
    streamed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Estimate:
    """The plan of a run on given hardware.

    `memory` is that of the rank that needs most, by stage; `limit_bytes` what it may fill. `notes` are
    assumptions, `obstacles` what does not run or fit as the recipe is.
    """

    recipe: str
    hardware: str
    device: str
    sources: tuple[str, ...]
    num_processes: int
    num_machines: int
    backend: str
    grid: Grid
    micro_batch_tokens: int
    memory: tuple[StageMemory, ...]
    limit_bytes: float
    host_limit_bytes: float | None
    phases: tuple[PhaseEstimate, ...]
    evaluation_s: float
    changes: tuple[Change, ...] = ()
    fitted: tuple[Fitted, ...] = ()
    notes: tuple[str, ...] = ()
    obstacles: tuple[str, ...] = ()

    @property
    def peak(self) -> StageMemory:
        """The stage that needs most."""
        return max(self.memory, key=lambda stage: stage.total())

    @property
    def peak_bytes(self) -> float:
        return self.peak.total()

    @property
    def peak_host_bytes(self) -> float:
        return max(stage.total("host") for stage in self.memory)

    @property
    def fits(self) -> bool:
        """Whether both memories suffice."""
        host = self.host_limit_bytes
        return self.peak_bytes <= self.limit_bytes and (host is None or self.peak_host_bytes <= host)

    @property
    def seconds(self) -> float:
        """All phases and the evaluation."""
        return sum(phase.seconds for phase in self.phases) + self.evaluation_s

    def document(self) -> dict[str, Any]:
        """Return the plan as JSON values, with the format's version and the sums that readers ask for."""
        summed = {
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "peak_stage": self.peak.stage,
            "fits": self.fits,
        }
        document = {"estimate": VERSION, **summed, **asdict(self)}
        for phase, record in zip(self.phases, document["phases"], strict=True):
            record |= {"round_s": phase.round_s, "seconds": phase.seconds}
            for stage, entry in zip(phase.stages, record["stages"], strict=True):
                entry |= {"seconds": stage.seconds, "bound": stage.bound}
        for memory, record in zip(self.memory, document["memory"], strict=True):
            record["total_bytes"] = memory.total()
        return document


def shown_parts(stage: StageMemory) -> Iterator[tuple[str, float]]:
    """Yield the parts in device memory from large to small; small ones are joined."""
    parts = sorted((p for p in stage.parts if p.where == "device"), key=lambda p: -p.num_bytes)
    small = [part for part in parts if part.num_bytes < _SMALLEST * stage.total()]
    for part in parts:
        if part not in small:
            yield part.name, part.num_bytes
    if small:
        yield _OTHER, sum(part.num_bytes for part in small)


def duration(seconds: float) -> str:
    """Format seconds in the largest unit that has at least two digits."""
    for limit, size, unit in ((120.0, 1.0, "s"), (7200.0, 60.0, "min"), (172800.0, 3600.0, "h")):
        if seconds < limit:
            return f"{seconds / size:,.{1 if seconds / size >= 10 else 2}f} {unit}"
    return f"{seconds / 86400:,.1f} days"
