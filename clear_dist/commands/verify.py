"""`clear-dist verify`: whether this machine computes and communicates as it should."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

from clear_dist.launch import ends, env, ranks
from clear_dist.launch.env import Place
from clear_dist.request import devices, outputs
from clear_dist.request.flags import STDOUT, VerifyFlags

RANKS_ON_CPU = 2
"""The fewest that have something to say to each other."""
PRELOAD = ("torch", "clear_dist.verify")


def verify(flags: VerifyFlags) -> int:
    """Check this machine: halos, text reductions, attention, a tiny model, and the links between ranks.

    Takes less than a minute and downloads nothing. Ends with 0 if all checks pass, with 1 if one fails.
    """
    place = env.read()
    setting = settled(flags, place)
    for line in setting.lines if place.rank == 0 else ():
        ends.say(line)
    work, on_cuda = partial(_verify, setting.device, flags.json), setting.device == "cuda"
    return ranks.run(work, nproc=setting.world_size, on_cuda=on_cuda, traceback=flags.traceback, preload=PRELOAD)


def _verify(device: str, output: str | None) -> None:
    import_module("clear_dist.verify").verify(device, output)  # torch: not for --help, nor for a refusal


@dataclass(frozen=True, kw_only=True)
class Setting:
    device: str
    world_size: int
    lines: tuple[str, ...]


def settled(flags: VerifyFlags, place: Place) -> Setting:
    """Raises a Refusal for a missing device, a number of ranks other than torchrun's, or an unwritable report."""
    gpus = devices.gpus_for(flags.device)
    size = devices.world_size(flags.nproc, place, otherwise=gpus or RANKS_ON_CPU)
    if flags.json is not None and flags.json != STDOUT:
        outputs.check_file("--json", Path(flags.json), (".json",))
    here = place.local_world_size if place.launcher is not None else size
    return Setting(device="cuda" if gpus else "cpu", world_size=size, lines=tuple(_notes(flags, gpus, size, here)))


def _notes(flags: VerifyFlags, gpus: int, size: int, here: int) -> Iterator[str]:
    if flags.device == "auto" and not gpus:
        yield "device: cpu (no CUDA GPU here)"
    if gpus and here > gpus:
        yield f"{here} ranks share {gpus} GPU{'s' * (gpus > 1)}: they exchange through host memory"
    if size == 1:
        yield "one rank: no halos, nothing between neighbours; for these: --nproc 2"
