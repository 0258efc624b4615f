"""What can be checked, and chosen, before the ranks of `clear-dist verify` start: no torch here."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clear_dist.comm.env import Place
from clear_dist.config.verification import STDOUT, VerifyConfig
from clear_dist.preflight import devices, outputs

RANKS_ON_CPU = 2
"""The fewest that have something to say to each other."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What to verify on."""

    device: str
    world_size: int
    lines: tuple[str, ...]
    """For the user."""


def check(config: VerifyConfig, place: Place) -> Setting:
    """The device and the number of ranks.

    Raises:
        Refusal: there is no such device, torchrun has started another number of ranks, or the report cannot be written.
    """
    gpus = devices.gpus_for(config.device)
    size = devices.world_size(config.nproc, place, otherwise=gpus or RANKS_ON_CPU)
    if config.json is not None and config.json != STDOUT:
        outputs.check_file("--json", Path(config.json), (".json",))
    here = place.local_world_size if place.launcher is not None else size
    return Setting(device="cuda" if gpus else "cpu", world_size=size, lines=tuple(_notes(config, gpus, size, here)))


def _notes(config: VerifyConfig, gpus: int, size: int, here: int) -> Iterator[str]:
    if config.device == "auto" and not gpus:
        yield "device: cpu (no CUDA GPU here)"
    if gpus and here > gpus:
        yield f"{here} ranks share {gpus} GPU{'s' * (gpus > 1)}: they exchange through host memory"
    if size == 1:
        yield "one rank: no halos, nothing between neighbours; for these: --nproc 2"
