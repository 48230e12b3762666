"""Run verifiers that could hang or crash, in a process of their own that a `WorkerPool` starts.

It reads lines of JSON from stdin and answers each with a line on stdout, which user code cannot reach.
"""

from __future__ import annotations

import json
import os
import signal
from typing import Any, BinaryIO

from pydantic import TypeAdapter

from mergeopd.errors import VerifierError
from mergeopd.recipe.verifiers import Verifier
from mergeopd.reward.verifiers import Verify, build_verifier

START_TIMEOUT_S = 120.0
"""For importing a user's module, which may import torch on a loaded machine."""
_MAX_MESSAGE = 500
# The pool ends a worker at its time limit. A worker whose pool was killed ends itself a little later.
_GRACE_S = 5.0


def main() -> None:
    """Build the verifiers that the first line describes, then verify one response per line."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    signal.setitimer(signal.ITIMER_REAL, START_TIMEOUT_S + _GRACE_S)
    setup = json.loads(requests.readline())
    try:
        verifiers = {
            name: build_verifier(TypeAdapter(Verifier).validate_python(spec), setup["allow_code"])
            for name, spec in setup["verifiers"].items()
        }
    except BaseException as error:  # noqa: BLE001  user code may raise anything
        _reply(replies, {"failure": _message(error)})
        return
    signal.setitimer(signal.ITIMER_REAL, 0)
    _reply(replies, {})
    for line in requests:
        request = json.loads(line)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, request["timeout_s"] + _GRACE_S)
        reply = _verified(verifiers[request["source"]], request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(replies, reply)


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


def _reply(replies: BinaryIO, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply).encode() + b"\n")
    replies.flush()


if __name__ == "__main__":
    main()
