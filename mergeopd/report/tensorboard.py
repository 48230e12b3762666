"""Events for TensorBoard: the numbers of metrics.jsonl as curves, in the run's `tensorboard` folder.

Needs the package tensorboard (`pip install 'mergeopd[tensorboard]'`), imported when a run begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeopd.report.events import Event, Note, Reporter, RunStarted, UpdateDone
from mergeopd.report.jsonl import update_record

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardReporter:
    """Writes every update's scalars at once. No failure of it ends a run: `notes` is told, and it stops."""

    def __init__(self, folder: Path, notes: Reporter) -> None:
        self._folder = folder
        self._notes = notes
        self._writer: SummaryWriter | None = None

    def emit(self, event: Event) -> None:
        """Open a file of events at the start of the process, add to it at updates."""
        try:
            if isinstance(event, RunStarted):
                self._writer = _open(self._folder, event.resumed_at)
            elif isinstance(event, UpdateDone) and self._writer is not None:
                for tag, value in scalars(event):
                    self._writer.add_scalar(tag, value, event.update)
                self._writer.flush()
        except OSError as error:
            self._writer = None
            self._notes.emit(
                Note(f"no more events for TensorBoard: {self._folder}: {error.strerror or error}")
            )


def scalars(event: UpdateDone) -> Iterator[tuple[str, float]]:
    """Tags with values, as `teacher_reverse_kl/math`: TensorBoard shows what stands before `/` side by side.

    The same numbers under the same names as in metrics.jsonl; what an update does not have is left out.
    """
    record = update_record(event)
    for name in ("loss", "lr", "grad_norm", "num_tokens", "on_policy_fraction"):
        yield f"update/{name}", record[name]
    yield from _by_name("teacher", record["teachers"])
    yield from _by_name("domain", record["domains"])
    for name, value in record["policy"].items():
        if value is not None:
            yield f"policy/{name}", value
    for stage, seconds in record["cost"]["seconds"].items():
        yield f"seconds/{stage}", seconds
    for name in ("tokens_per_s", "teacher_bytes_read"):
        if record["cost"][name] is not None:
            yield f"cost/{name}", record["cost"][name]


def _by_name(kind: str, parts: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    for name, numbers in parts.items():
        for quantity, value in numbers.items():
            if value is not None:
                yield f"{kind}_{quantity}/{name}", value


def _open(folder: Path, num_done: int) -> SummaryWriter:
    # Here, since torch takes seconds to import, and tensorboard is an extra.
    from torch.utils.tensorboard import SummaryWriter

    # What an interrupted process wrote after its last checkpoint is done again, and shown once.
    return SummaryWriter(str(folder), purge_step=num_done + 1)
