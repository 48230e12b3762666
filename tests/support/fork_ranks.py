"""Run the ranks of a worker script as forks of one process with its imports, which take seconds.

    python fork_ranks.py WORKER WORLD FOLDER ARGUMENTS...

Every rank runs `WORKER RANK WORLD FOLDER/store FOLDER/rankRANK.out ARGUMENTS...` and writes FOLDER/rankRANK.log.
The exit code is 1 when a rank fails. Nothing that is imported may start a thread or a process group.
"""

from __future__ import annotations

import gc
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import NoReturn


def run_rank(worker: str, rank: int, world: int, folder: Path, arguments: list[str]) -> NoReturn:
    code = 1
    try:
        log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        out = folder / f"rank{rank}.out"
        sys.argv = [worker, str(rank), str(world), str(folder / "store"), str(out), *arguments]
        runpy.run_path(worker, run_name="__main__")
        code = 0
    except BaseException:  # noqa: BLE001 - the rank must not continue as its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(worker: str, world: int, folder: Path, arguments: list[str]) -> int:
    sys.path.insert(0, str(Path(worker).parent))
    runpy.run_path(worker)
    gc.freeze()  # the ranks need not collect the imported modules
    ranks = []
    for rank in range(world):
        process = os.fork()
        if process == 0:
            run_rank(worker, rank, world, folder, arguments)
        ranks.append(process)
    statuses = [os.waitpid(process, 0)[1] for process in ranks]
    return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
