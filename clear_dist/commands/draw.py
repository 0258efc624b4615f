"""`clear-dist generate` and `upscale`: check the request, start the ranks, end."""

import sys
import time
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module

from clear_dist.families.cards import CARDS
from clear_dist.launch import ends, env, interrupts, ranks, streams
from clear_dist.plan import fit_here
from clear_dist.request.flags import GenerateFlags, PictureFlags, UpscaleFlags
from clear_dist.request.request import Request
from clear_dist.request.settle import settle

PRELOAD = ("torch", "clear_dist.drawing.generation")


def generate(flags: GenerateFlags) -> int:
    """Draw pictures from a prompt, on one rank or many. No argument is required."""
    return _run(flags)


def upscale(flags: UpscaleFlags) -> int:
    """Make pictures larger: enlarge each, add noise, and denoise it again, stage by stage (SDEdit)."""
    return _run(flags)


def _run(flags: PictureFlags) -> int:
    began, place = time.time(), env.read_for(flags.nproc)
    request, facts, notes = settle(flags, place, CARDS)
    for line in notes if place.rank == 0 else ():
        ends.say(line)
    if place.local_rank == 0:
        ranks.hush()
        import_module("clear_dist.hub").ask(request, CARDS)  # its library takes a while: not for --help
    check = fit_here.begin(request, facts, place)
    return ranks.run(
        partial(_render, request, began),
        nproc=request.world_size,
        on_cuda=request.device == "cuda",
        traceback=flags.traceback,
        preload=PRELOAD,
        beside=None if check is None else check.require,
        farewell=interrupts.SECONDS_TO_END if request.resume else ranks.FAREWELL_SECONDS,
    )


def _render(request: Request, began: float) -> None:
    with redirect_stdout(streams.deaf(sys.stdout)):  # the result is the pictures; stdout only tells of them
        import_module("clear_dist.commands.render").render(request, began)  # torch: not for --help, nor for a refusal
