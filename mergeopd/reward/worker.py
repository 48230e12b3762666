"""Run verifiers that could hang or crash, in a separate process that a `WorkerPool` starts.

Requests and replies are JSON messages over the connection whose file descriptor is the argument.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from pydantic import TypeAdapter

from mergeopd.errors import VerifierError
from mergeopd.recipe.verifiers import Verifier
from mergeopd.reward.protocol import Verify
from mergeopd.reward.verifiers import build_verifier

START_TIMEOUT_S = 120.0
"""For importing a user's module, which may import torch on a loaded machine."""
_MAX_MESSAGE = 500
# The pool ends a worker at its time limit. A worker whose pool was killed ends itself a little later.
_GRACE_S = 5.0


def main(descriptor: int) -> None:
    """Build the verifiers that the first message describes, then verify one response per message."""
    os.set_inheritable(descriptor, False)
    with Connection(descriptor) as connection:
        signal.setitimer(signal.ITIMER_REAL, START_TIMEOUT_S + _GRACE_S)
        setup = json.loads(connection.recv_bytes())
        try:
            verifiers = {
                name: build_verifier(TypeAdapter(Verifier).validate_python(spec), setup["allow_code"])
                for name, spec in setup["verifiers"].items()
            }
        except BaseException as error:  # noqa: BLE001  user code may raise anything
            _send(connection, {"failure": _message(error)})
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(connection, {})
        with suppress(EOFError):  # the pool was closed
            while True:
                request = json.loads(connection.recv_bytes())
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, request["timeout_s"] + _GRACE_S)
                reply = _verified(verifiers[request["source"]], request)
                signal.setitimer(signal.ITIMER_REAL, 0)
                _send(connection, reply)


def _verified(verify: Verify, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"reward": verify(request["response"], request["reference"], truncated=request["truncated"])}
    except BaseException as error:  # noqa: BLE001
        return {"failure": _message(error)}


def _message(error: BaseException) -> str:
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001
        text = "(its message cannot be shown)"
    return (text if isinstance(error, VerifierError) else f"{type(error).__name__}: {text}")[:_MAX_MESSAGE]


def _send(connection: Connection, reply: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(reply).encode())


if __name__ == "__main__":
    main(int(sys.argv[1]))
