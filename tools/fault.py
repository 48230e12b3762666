"""Run mergeopd with a fault injected at a chosen place, by patching functions from outside.

    python tools/fault.py scoring:2:KILL run recipe.yaml

A fault is PLACE:CALL:ACTION. PLACE is a key of `PLACES`, CALL counts its calls in this process from 1, ACTION
happens at that call: KILL, TERM, INT or STOP send the process that signal, INT+INT sends two, and FULL=N
limits files to N bytes from there on (RLIMIT_FSIZE; writes fail as on a full disk).

    python tools/fault.py --count FILE run recipe.yaml

writes how often each place was called to FILE, as JSON.

    python tools/fault.py --trained FILE [PLACE:CALL:ACTION] run recipe.yaml

appends a line to FILE after each update: its number, and prompt, origin and sample of all responses.

    python tools/fault.py --serve run recipe.yaml --set output=warm-up

runs this once without output, then reads requests, one JSON document per line, and writes one response for
each: `{"argv": [...], "fault": "..."}` becomes `{"code": ..., "output": ...}`. Every request runs in its own
process, forked from this one, which has warm imports and caches; a negative code is the signal that ended it.
POSIX only.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import io
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

# Name: (function, at the place where it is looked up; whether the fault happens before or after the call).
PLACES = {
    "text": ("mergeopd.storage.completion_cache:_write", "before"),
    "rollout": ("mergeopd.rollout.local:sample", "before"),
    "publish": ("mergeopd.storage.published_weights:write_model", "after"),
    "load": ("mergeopd.rollout.served:ServedEngine._load", "before"),
    "loaded": ("mergeopd.rollout.served:ServedEngine._load", "after"),
    "reply": ("mergeopd.rollout.served:_Running._checked", "after"),
    "scoring": ("mergeopd.teacher.hidden_cache:HiddenCache.put", "before"),
    "gradient": ("mergeopd.student.whole_weights:WholeWeights.backward", "after"),
    "update": ("mergeopd.student.torch:TorchStudent.optimizer_step", "before"),
    "step": ("torch.optim:AdamW.step", "after"),
    "metrics": ("mergeopd.storage.metrics:MetricsFile.append", "after"),
    "checkpoint": ("mergeopd.engine.checkpoint:Checkpoints.save", "before"),
    "files": ("mergeopd.storage.state_parts:save_file", "after"),
    "manifest": ("mergeopd.storage.folders:_manifest_text", "before"),
    "rename": ("pathlib:Path.rename", "before"),
    "renamed": ("pathlib:Path.rename", "after"),
    "replace": ("pathlib:Path.replace", "before"),
    "unlink": ("os:unlink", "after"),
    "export": ("mergeopd.student.torch:TorchStudent.export", "after"),
    "evaluation": ("mergeopd.engine.evaluate:Evaluation._grade", "before"),
}
_LONGEST_S = 120


def watch(place: str, at_call: Callable[[int], None]) -> None:
    """Call `at_call(number)` at every call of a place."""
    target, when = PLACES[place]
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)
    calls = 0

    @functools.wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        number = calls
        if when == "before":
            at_call(number)
        result = original(*args, **kwargs)
        if when == "after":
            at_call(number)
        return result

    setattr(owner, name, watched)


def arm(fault: str) -> None:
    """Install a fault. Raises ValueError or KeyError for a wrong format."""
    place, number, action = fault.split(":")
    at = int(number)

    def strike(call: int) -> None:
        if call == at:
            act(action)

    watch(place, strike)


def act(action: str) -> None:
    """Perform the action of a fault."""
    kind, _, value = action.partition("=")
    if kind == "FULL":
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(value), hard))
        return
    for name in kind.split("+"):
        os.kill(os.getpid(), signal.Signals[f"SIG{name}"])


def call_main(argv: Sequence[str]) -> int:
    """Run the command line in this process; return its exit code."""
    from mergeopd.cli import main

    sys.argv = ["mergeopd", *argv]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def count(file: Path, argv: Sequence[str]) -> int:
    """Run the command line and count the calls of every place."""
    counts = dict.fromkeys(PLACES, 0)
    for place in PLACES:
        watch(place, lambda call, place=place: counts.update({place: call}))  # type: ignore[misc]
    code = call_main(argv)
    file.write_text(json.dumps(counts), encoding="utf-8")
    return code


def record_trained(file: Path) -> None:
    """Append prompt, origin and sample of all responses of an update to a file, after each."""
    from mergeopd.engine.update import Updater

    step = Updater.step

    @functools.wraps(step)
    def recorded(self: Any, scored: Any, update: Any, progress: Any) -> Any:
        after = step(self, scored, update, progress)
        responses = [scored.collected.rollouts[i] for i in update.rollouts]
        trained = sorted((one.prompt.key, one.origin, one.sample) for one in responses)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"update": after.update, "trained": trained}) + "\n")
        return after

    Updater.step = recorded  # type: ignore[method-assign]


def serve(warm_up: Sequence[str]) -> None:
    """Run a command line, then process requests until the input ends."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        code = call_main(warm_up)
    if code:
        sys.exit(told.getvalue())
    gc.collect()
    gc.freeze()  # the forks need not collect the imported modules
    for line in sys.stdin:
        code, output = _forked(json.loads(line))
        print(json.dumps({"code": code, "output": output}), flush=True)


def _forked(order: dict[str, Any]) -> tuple[int, str]:
    # A pipe, because a limit on file sizes must not apply to the output.
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _be_the_child(order, writing)
    os.close(writing)
    with os.fdopen(reading, errors="replace") as pipe:
        output = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), output


def _be_the_child(order: dict[str, Any], writing: int) -> NoReturn:
    code = 1  # of a traceback
    try:
        signal.alarm(_LONGEST_S)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        if order["fault"] is not None:
            arm(order["fault"])
        code = call_main(order["argv"])
    except BaseException:  # noqa: BLE001 - the child must not continue with the parent's work
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2:])
    elif sys.argv[1:2] == ["--count"]:
        sys.exit(count(Path(sys.argv[2]), sys.argv[3:]))
    elif sys.argv[1:2] == ["--trained"]:
        record_trained(Path(sys.argv[2]))
        given = sys.argv[3:]
        if given[0] != "run":
            arm(given.pop(0))
        sys.exit(call_main(given))
    elif len(sys.argv) > 2:
        arm(sys.argv[1])
        sys.exit(call_main(sys.argv[2:]))
    else:
        sys.exit(__doc__)
