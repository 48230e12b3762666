"""Exit codes of errors, and the choice of the process that shows them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from mergeopd.distributed.rendezvous import ErrorToReport, RankInfo, claim_report
from mergeopd.errors import MergeopdError, PeerFailed, RecipeError, Stopped, StoppedByAlarm
from mergeopd.reporting.failure import show_error


def exit_code(error: BaseException) -> int:
    """Return 2 for a wrong recipe, 3 for a run stopped on request, 4 for one stopped by an alarm, else 1."""
    if isinstance(error, StoppedByAlarm):
        return 4
    return 2 if isinstance(error, RecipeError) else 3 if isinstance(error, Stopped) else 1


@contextmanager
def errors_shown() -> Iterator[None]:
    """Show mergeopd's own errors without a traceback, and exit with their code."""
    try:
        yield
    except MergeopdError as error:
        if isinstance(error, Stopped):
            print(error, file=sys.stderr)
        else:
            show_error(error)
        sys.exit(exit_code(error))


@contextmanager
def one_process_reports(place: RankInfo) -> Iterator[None]:
    """In a run of several processes, show an error in only one of them; each exits with its code."""
    if place.world == 1:
        yield
        return
    # torch prints pages of addresses in every process when a peer closes a connection.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    code = 0
    try:
        yield
    except typer.Exit as exit_:
        code = exit_.exit_code
    except Stopped as error:
        code = exit_code(error)
        if place.rank == 0:
            print(error, file=sys.stderr)
    except PeerFailed:
        code = 1
    except ErrorToReport as wrapper:
        code = exit_code(wrapper.error)
        show_error(wrapper.error)
    except Exception as error:  # noqa: BLE001 (is shown, and the process ends)
        code = exit_code(error)
        if claim_report(place):
            show_error(error)
    if code:
        # Threads of a process group that lost a process may never end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
