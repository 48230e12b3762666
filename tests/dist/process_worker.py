"""One process of `mergeopd run` whose run is a scene of a few lines: `process_worker.py SCENE`."""

from __future__ import annotations

import os
import signal
import sys
from types import SimpleNamespace

import mergeopd.api
from mergeopd.cli import main
from mergeopd.distributed.rendezvous import RankInfo, open_communicator
from mergeopd.errors import Location, ModelError, Problem, RecipeError, Stopped
from mergeopd.distributed.communicator import SingleProcess


def meet_for_ever(ranks):
    while True:
        ranks.gather(ranks.rank)


def fine(ranks):
    assert ranks.gather(ranks.rank) == list(range(ranks.size))
    if ranks.is_first:
        print("all here", flush=True)


def error_in_the_middle(ranks):
    ranks.gather(None)
    if ranks.rank == 1:
        raise ModelError("models/x: has no weights")
    meet_for_ever(ranks)


def error_of_all(ranks):
    raise ModelError("models/x: has no weights")


def error_in_a_share(ranks):
    def work():
        if ranks.rank == 1:
            raise ModelError("models/x: has no weights")

    ranks.run_and_gather(work)


def bug(ranks):
    if ranks.rank == 1:
        raise ValueError("not what was expected")
    meet_for_ever(ranks)


def stopped(ranks):
    ranks.gather(None)
    raise Stopped("stopped by --updates")


def vanished(ranks):
    """Ends without an exception that anybody could tell of."""
    if ranks.rank == 1:
        os._exit(9)
    meet_for_ever(ranks)


def killed(ranks):
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    meet_for_ever(ranks)


def recipe_error():
    raise RecipeError([Problem(Location("x.yaml"), "seed", "is wrong")])


def own_error():
    """Before they meet, of one only."""
    if os.environ["RANK"] == "1":
        raise ModelError("models/x: is not on this disk")


def bug_before():
    raise ValueError("not what was expected")


BEFORE = {"recipe_error": recipe_error, "own_error": own_error, "bug_before": bug_before}


def scene(*_, **__):
    play()
    return SimpleNamespace(is_finished=True)


def play():
    name = sys.argv[-1]
    BEFORE.get(name, lambda: None)()
    with open_communicator(RankInfo.of(), grouped=True) as ranks:
        if name == "group":
            import torch.distributed as dist

            assert isinstance(ranks, SingleProcess)
            objects = [None]
            dist.all_gather_object(objects, "alone")
            print(*objects, dist.get_world_size(), flush=True)
            return
        globals()[name](ranks)


if __name__ == "__main__":
    name = sys.argv[1]
    sys.argv = ["mergeopd", "run", name]
    mergeopd.api.run = scene
    main()
