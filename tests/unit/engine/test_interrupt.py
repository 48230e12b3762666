"""Signals while a run stops: a second one interrupts neither the checkpoint nor its message."""

from __future__ import annotations

import hashlib
import os
import signal
import threading

import pytest

from mergeopd.engine.interrupt import Interrupt
from mergeopd.errors import Stopped


def test_ctrl_c_after_sigterm_is_the_first_one() -> None:
    interrupt = Interrupt()
    with interrupt.listening():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_once_all_is_saved_signals_are_ignored(first: signal.Signals) -> None:
    interrupt = Interrupt()
    with pytest.raises(Stopped), interrupt.listening():  # noqa: PT012
        signal.raise_signal(first)
        interrupt.ignore_further()
        signal.raise_signal(signal.SIGINT)
        raise Stopped("saved")
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)


def test_after_other_endings_the_handlers_are_as_before() -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupt = Interrupt()
    with pytest.raises(Stopped), interrupt.listening():  # noqa: PT012
        interrupt.requested = "--updates"
        interrupt.ignore_further()
        raise Stopped("saved")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_request_is_acknowledged_before_its_handler_can_run() -> None:
    """As during an operation of torch: until the hash is computed, Python executes nothing in this thread."""
    known, began = threading.Event(), threading.Event()
    interrupt = Interrupt(lambda name: known.set() if name == "SIGTERM" else None)
    handled_before: list[str | None] = []

    def press() -> None:
        began.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        known.wait(10)
        handled_before.append(interrupt.requested)

    thread = threading.Thread(target=press)
    thread.start()
    with interrupt.listening():
        began.set()
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 3_000_000)
        thread.join()
    assert handled_before == [None]
    assert interrupt.requested == "SIGTERM"
    assert signal.set_wakeup_fd(-1) == -1  # as before


def test_two_requests_during_one_operation_count_twice() -> None:
    known, began = threading.Event(), threading.Event()
    interrupt = Interrupt(lambda _: known.set())

    def press() -> None:
        began.wait()
        os.kill(os.getpid(), signal.SIGINT)
        known.wait(10)  # the kernel merges signals that are not delivered yet
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    with interrupt.listening(), pytest.raises(KeyboardInterrupt):  # noqa: PT012
        began.set()
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 3_000_000)
    thread.join()
