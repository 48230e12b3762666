"""The files in docs/architecture.md's walk of token ids are those of a traced round."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from enumeration import CPU, VERIFIER, trainer_of

import mergeopd
from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.models import Machine, load_models
from mergeopd.engine.progress import Progress
from mergeopd.preflight.inputs import preflight

PACKAGE = Path(mergeopd.__file__).parent
ARCHITECTURE = PACKAGE.parent / "docs" / "architecture.md"


def test_the_walk_is_that_of_a_round(write_job: Callable[..., Path]) -> None:
    walk = re.findall(r"^\| \d+ \| `([\w/.]+)` \|", ARCHITECTURE.read_text(encoding="utf-8"), re.MULTILINE)
    assert 10 <= len(walk) <= 19
    assert len(set(walk)) == len(walk)
    verifier = f"prompts.0.verifier={VERIFIER}".replace("'", '"')
    trainer = trainer_of(load_models(preflight(write_job(), [verifier]), Machine(CPU, SingleProcess())))
    entered: list[str] = []

    def record(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in path.parents:
            name = path.relative_to(PACKAGE).as_posix()
            if name in walk and entered[-1:] != [name]:
                entered.append(name)

    trainer.pipeline.trained(0)
    sys.setprofile(record)
    try:
        trainer._round(Progress())
    finally:
        sys.setprofile(None)
    place = -1
    for name in walk:
        place = entered.index(name, place + 1)  # ValueError: the round does not come here after the last one
