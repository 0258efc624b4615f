"""`clear-dist verify`: whether this machine computes and communicates as it should."""

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

from clear_dist.launch import ends, env, ranks
from clear_dist.launch.env import Place
from clear_dist.request import devices, outputs
from clear_dist.request.flags import STDOUT, VerifyFlags
from clear_dist.request.notes import sharing

RANKS_ON_CPU = 2
"""The fewest that have something to say to each other."""
PRELOAD = ("torch", "clear_dist.verify")


def verify(flags: VerifyFlags) -> int:
    """Check this machine: halos, text reductions, attention, a tiny model, and the links between ranks.

    Takes less than a minute and downloads nothing. Ends with 0 if all checks pass, with 1 if one fails.
    """
    place = env.read_for(flags.nproc)
    gpus = devices.gpus_for(flags.device)
    size = devices.world_size(flags.nproc, place, otherwise=gpus or RANKS_ON_CPU)
    if flags.json is not None and flags.json != STDOUT:
        outputs.check_file("--json", Path(flags.json), (".json",))
    for line in _notes(flags, place, gpus, size) if place.rank == 0 else ():
        ends.say(line)
    work, on_cuda = partial(_verify, "cuda" if gpus else "cpu", flags.json, flags.join_timeout), gpus > 0
    return ranks.run(work, nproc=size, on_cuda=on_cuda, traceback=flags.traceback, preload=PRELOAD)


def _verify(device: str, output: str | None, join_seconds: float) -> None:
    import_module("clear_dist.verify").verify(
        device, output, join_seconds=join_seconds
    )  # torch: not for --help, nor for a refusal


def _notes(flags: VerifyFlags, place: Place, gpus: int, size: int) -> Iterator[str]:
    if flags.device == "auto" and not gpus:
        yield "device: cpu (no CUDA GPU here)"
    yield from sharing(gpus, place.local_world_size if place.launcher is not None else size)
    if size == 1:
        yield "one rank: no halos, nothing between neighbours; for these: --nproc 2"
