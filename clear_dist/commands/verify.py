"""`clear-dist verify`: whether this machine computes and communicates as it should."""

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

from clear_dist.launch import ends, env, ranks
from clear_dist.request import devices, outputs
from clear_dist.request.flags import STDOUT, VerifyFlags

RANKS_ON_CPU = 2
"""The fewest that have something to say to each other."""
PRELOAD = ("torch", "clear_dist.verify")


def verify(flags: VerifyFlags) -> int:
    """Check this machine: halos, text reductions, attention, a tiny model, and the links between ranks.

    Takes less than a minute and downloads nothing. Ends with 0 if all checks pass, with 1 if one fails.
    """
    place = env.read_for(flags.nproc)
    gpus = len(devices.gpus_for(flags.device))
    size = devices.world_size(flags.nproc, place, otherwise=gpus or RANKS_ON_CPU)
    if flags.json is not None and flags.json != STDOUT:
        outputs.check_file("--json", Path(flags.json), (".json",))
    for line in _notes(flags, gpus, size) if place.rank == 0 else ():
        ends.say(line)
    work = partial(_verify, flags, "cuda" if gpus else "cpu")
    return ranks.run(work, nproc=size, on_cuda=gpus > 0, traceback=flags.traceback, preload=PRELOAD)


def _verify(flags: VerifyFlags, device: str) -> None:
    import_module("clear_dist.verify").verify(
        device, flags.json, join_seconds=flags.join_timeout, share_gpus=flags.share_gpus
    )  # torch: not for --help, nor for a refusal


def _notes(flags: VerifyFlags, gpus: int, size: int) -> Iterator[str]:
    if flags.device == "auto" and not gpus:
        yield "device: cpu (no CUDA GPU here)"
    if size == 1:
        yield "one rank: no halos, nothing between neighbours; for these: --nproc 2"
