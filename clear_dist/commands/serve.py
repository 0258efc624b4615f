"""`clear-dist serve`: check the model, start the ranks, and have rank 0 answer HTTP until it is asked to end."""

import os
import time
from functools import partial
from importlib import import_module
from importlib.util import find_spec

from clear_dist.commands.draw import PRELOAD
from clear_dist.families.cards import CARDS
from clear_dist.launch import ends, env, ranks
from clear_dist.options import Refusal
from clear_dist.plan import fit_here
from clear_dist.request import devices
from clear_dist.request.serve import KEY_VARIABLE, ServeFlags, check_key, key_of
from clear_dist.request.settle import settle

NEEDED = ("fastapi", "uvicorn", "multipart", "prometheus_client")
NAME = "model.png"
"""Of a picture that is never drawn, for the request that the model is loaded for."""


def serve(flags: ServeFlags) -> int:
    """Answer HTTP with pictures, in OpenAI's way, by a model that is loaded once."""
    began, place = time.time(), env.read_for(flags.nproc)
    for package in NEEDED:
        if find_spec(package) is None:
            raise Refusal(f"serve needs the package {package}, which is not installed; nearest: clear-dist[serve]")
    key = key_of(flags, os.environ.get(KEY_VARIABLE))
    check_key(flags, key)
    _make_folder(flags)
    if flags.lora_dir is not None and not flags.lora_dir.is_dir():
        raise Refusal(f"--lora-dir must be a folder, got {flags.lora_dir}; nearest: none")
    request, facts, notes = settle(flags.for_pictures(prompt="", output=flags.results / NAME), place, CARDS)
    for line in notes if place.rank == 0 else ():
        ends.say(line)
    if place.local_rank == 0:
        ranks.hush()
        import_module("clear_dist.hub").ask(request, CARDS)
    gpus = devices.find_gpus() if request.device == "cuda" else ()
    local = place.local_world_size if place.launcher else request.world_size
    room = fit_here.room_of(gpus, local)
    check = fit_here.begin(request, facts, place, room)
    # Imported in the rank: settled.py is torch's neighbour.
    known = {"flags": flags, "request": request, "facts": facts, "place": place, "room": room, "key": key}
    return ranks.run(
        partial(_answer, known, began),
        nproc=request.world_size,
        on_cuda=request.device == "cuda",
        traceback=flags.traceback,
        preload=PRELOAD,
        beside=None if check is None else check.require,
    )


def _make_folder(flags: ServeFlags) -> None:
    try:
        flags.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(
            f"--results must be a folder that can be written to, got {flags.results} ({error.strerror}); nearest: "
            "--results clear-dist-results"
        ) from error


def _answer(known: dict[str, object], began: float) -> None:
    import_module("clear_dist.commands.answer").answer(known, began)  # torch and FastAPI: not for --help
