"""Requests to stop: SIGTERM (pre-emption) and Ctrl-C."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from mergeopd.distributed.communicator import CollectiveAbort, Communicator

_SIGNALS = {signal.SIGINT.name, signal.SIGTERM.name}


class Interrupt:
    """Stores a request to stop. A second Ctrl-C raises KeyboardInterrupt at once.

    `acknowledge` is called with the name of the first signal, in another thread: handlers run only between
    Python instructions, and one operation of torch can take minutes.
    """

    def __init__(self, acknowledge: Callable[[str], None] = lambda _: None) -> None:
        self._acknowledge = acknowledge
        self.requested: str | None = None
        self._num_ctrl_c = self._num_seen = 0  # handled, and seen by the other thread
        self._ignores_further = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM inside the context; handlers can only be set in the main thread.

        After `ignore_further`, both remain ignored, so that the process can end with everything saved.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with self._acknowledging():
            for number in before:
                signal.signal(number, self._take)
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, signal.SIG_IGN if self._ignores_further else handler)

    @contextmanager
    def _acknowledging(self) -> Iterator[None]:
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._watch, args=(reader,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            writer.close()
            thread.join()
            reader.close()

    def _watch(self, reader: socket.socket) -> None:
        """Acknowledge the first signal and count Ctrl-C; ends when the other end of the pair is closed."""
        is_known = False
        while numbers := reader.recv(16):
            names = [signal.Signals(number).name for number in numbers]
            self._num_seen += names.count(signal.SIGINT.name)
            if not is_known and (name := next((n for n in names if n in _SIGNALS), None)):
                is_known = True
                self._acknowledge(name)

    def ignore_further(self) -> None:
        """Ignore signals from now on, if one requested the stop, because everything is saved."""
        self._ignores_further = self.requested in _SIGNALS

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._num_ctrl_c += number == signal.SIGINT
        # Signals that arrive during one operation are handled once.
        if max(self._num_ctrl_c, self._num_seen) > 1 and not self._ignores_further:
            raise KeyboardInterrupt
        self.requested = self.requested or signal.Signals(number).name


class AbandonRound(CollectiveAbort):
    """Abandons a round that has not changed any weight yet."""


@dataclass(frozen=True)
class StopGuard:
    """Carries out requests to stop between units of work that can be repeated."""

    interrupt: Interrupt
    ranks: Communicator

    def check(self) -> None:
        """Raise AbandonRound when a stop was requested and no collective is in progress."""
        if self.interrupt.requested is not None and self.ranks.outside_collective:
            raise AbandonRound

    def is_requested_anywhere(self) -> bool:
        """Whether a stop was requested on any process; if so, request it on all. Collective."""
        requests = [request for request in self.ranks.gather(self.interrupt.requested) if request]
        self.interrupt.requested = requests[0] if requests else None
        return bool(requests)
