"""TensorBoard: event files in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeopd.messages import shown
from mergeopd.recipe.trackers import TensorBoard
from mergeopd.reporting.events import AlarmRaised
from mergeopd.reporting.trackers.protocol import NO_STEP, Opened, Outcome, TrackedRun
from mergeopd.reporting.trackers.values import alarm_texts
from mergeopd.storage import run_layout

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardTracker:
    """Writes event files. Readers drop the earlier values of updates that are repeated after a resume."""

    title = "TensorBoard"

    def __init__(self, settings: TensorBoard) -> None:
        self._settings = settings

    def start(self, run: TrackedRun) -> Opened:
        # Imported here, since torch takes seconds to import and tensorboard is an extra.
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / run_layout.TENSORBOARD
        is_new = not any(folder.glob("events.out.tfevents.*"))
        purge_step = run.resumed_at + 1 if run.resumed_at else 0
        self._writer: SummaryWriter = SummaryWriter(str(folder), purge_step=purge_step)
        where = f"tensorboard --logdir {shown(folder)}"
        return Opened(NO_STEP if is_new else run.resumed_at or NO_STEP, where)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def alert(self, alarm: AlarmRaised) -> None:
        title, text = alarm_texts(alarm)
        self._writer.add_text(f"alarm/{title}", text, alarm.update)

    def summarize(self, values: Mapping[str, float], verdict: str, step: int) -> None:
        self.log(values, step)
        self._writer.add_text("result/verdict", verdict, step)

    def finish(self, outcome: Outcome) -> None:
        self._writer.close()
