"""`clear-dist verify`: whether this machine computes and communicates as it should."""

from functools import partial
from importlib import import_module
from typing import Annotated

import typer

from clear_dist.comm import ends, env, launch
from clear_dist.commands import options
from clear_dist.config.verification import VerifyConfig
from clear_dist.preflight import verification

Nproc = Annotated[
    int | None,
    typer.Option(help="ranks to start here (visible GPUs; 2 on CPU); not under torchrun", show_default=False),
]
Json = Annotated[
    str | None,
    typer.Option(help="versions, devices, every figure; - is stdout", metavar="FILE|-", show_default=False),
]


def verify(
    nproc: Nproc = None,
    device: options.Device = "auto",
    json: Json = None,
    traceback: options.Traceback = False,
) -> int:
    """Check this machine: halos, text reductions, attention, a tiny FLUX, and the links between ranks.

    Takes less than a minute and downloads nothing. Ends with 0 if all checks pass, with 1 if one fails.
    """
    config, place = VerifyConfig(nproc=nproc, device=device, json=json, traceback=traceback), env.read()
    setting = verification.check(config, place)
    for line in setting.lines if place.rank == 0 else ():
        ends.say(line)
    work = partial(_verify, setting.device, json)
    return launch.run(work, nproc=setting.world_size, on_cuda=setting.device == "cuda", traceback=traceback)


def _verify(device: str, output: str | None) -> None:
    import_module("clear_dist.verification").verify(device, output)  # torch: not for --help, nor for a refusal
