"""Write the numbers of metrics.jsonl as TensorBoard scalars to the run's `tensorboard` folder.

Needs the package tensorboard (`pip install 'mergeopd[tensorboard]'`), imported when a run starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mergeopd.reporting.events import Event, Note, Reporter, RunStarted, UpdateDone
from mergeopd.reporting.jsonl import UpdateRecord

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardReporter:
    """Writes every update's scalars. After an error it emits a note and stops writing; the run continues."""

    def __init__(self, folder: Path, notes: Reporter) -> None:
        self._folder = folder
        self._notes = notes
        self._writer: SummaryWriter | None = None

    def emit(self, event: Event) -> None:
        """Open an event file when the run starts, and add to it at updates."""
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
    """Yield tags with values, such as `teacher_reverse_kl/math`; TensorBoard groups charts by the first part.

    Keys are those of metrics.jsonl; missing values are left out.
    """
    record = UpdateRecord.of(event)
    numbers: dict[str, float | None] = {
        f"update/{key}": getattr(record, key)
        for key in ("loss", "lr", "grad_norm", "num_tokens", "on_policy_fraction")
    }
    for kind, parts in (("teacher", record.teachers), ("domain", record.domains)):
        numbers |= {
            f"{kind}_{key}/{name}": value for name, own in parts.items() for key, value in own.items()
        }
    numbers |= {f"policy/{key}": value for key, value in record.policy.items()}
    numbers |= {f"seconds/{stage}": value for stage, value in record.cost.seconds.items()}
    numbers |= {f"cost/{key}": getattr(record.cost, key) for key in ("tokens_per_s", "teacher_bytes_read")}
    yield from ((tag, value) for tag, value in numbers.items() if value is not None)


def _open(folder: Path, num_done: int) -> SummaryWriter:
    # Imported here, since torch takes seconds to import and tensorboard is an extra.
    from torch.utils.tensorboard import SummaryWriter

    # Updates after the last checkpoint of an interrupted process are repeated: drop the earlier ones.
    return SummaryWriter(str(folder), purge_step=num_done + 1)
