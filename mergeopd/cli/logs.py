"""`--verbose`: the package's log records on stderr."""

from __future__ import annotations

import logging
import os
import sys

VERBOSE = "MERGEOPD_VERBOSE"
"""Environment variable that passes `--verbose` on to the processes of a run."""


class _StderrHandler(logging.Handler):
    """Write to the current `sys.stderr`, which the live display replaces to print above its frame."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:  # noqa: BLE001 (as in logging: a record never ends the program)
            self.handleError(record)


def log_to_stderr(verbose: int) -> None:
    """Show records of the `mergeopd` loggers: INFO for 1, DEBUG for more."""
    os.environ[VERBOSE] = str(verbose)
    rank = os.environ.get("RANK")
    handler = _StderrHandler()
    process = "" if rank is None else f" [rank {rank}]"
    handler.setFormatter(logging.Formatter(f"%(asctime)s{process} %(name)s: %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("mergeopd")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if verbose == 1 else logging.DEBUG)
