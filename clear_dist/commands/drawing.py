"""What commands that draw have in common: check, start the ranks, end."""

import time
from functools import partial
from importlib import import_module

from clear_dist import preflight
from clear_dist.comm import ends, env, launch
from clear_dist.config import PictureConfig, Request


def run(config: PictureConfig) -> int:
    """Check the request, start its ranks, and return the exit status; notes go to stderr, once.

    Raises:
        Refusal: the request is wrong.
    """
    began, place = time.time(), env.read()
    request, lines = preflight.check(config, place)
    for line in lines if place.rank == 0 else ():
        ends.say(line)
    work = partial(_render, request, began)
    return launch.run(work, nproc=request.world_size, on_cuda=request.device == "cuda", traceback=config.traceback)


def _render(request: Request, began: float) -> None:
    import_module("clear_dist.commands.render").render(request, began)  # torch: not for --help, nor for a refusal
