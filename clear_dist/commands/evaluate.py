"""`clear-dist evaluate`: two sets of pictures checked, then scored."""

from functools import partial
from importlib import import_module

from clear_dist.launch import env, ranks
from clear_dist.launch.ends import say
from clear_dist.options import Refusal
from clear_dist.request import devices, outputs
from clear_dist.request.compared import Sample, find_samples
from clear_dist.request.evaluate import EvaluateFlags

PRELOAD = ("torch", "clear_dist.evaluate.run")


def evaluate(flags: EvaluateFlags) -> int:
    """Say how good pictures are, by the paper's figures: against others, their prompts, or their conditions.

    A figure whose feature model is not given is left out, and why is told. Downloads nothing but what is given by
    its hub id.
    """
    place = env.read()
    if place.world_size > 1:
        raise Refusal(f"evaluate runs on one rank, got {place.world_size}; nearest: clear-dist evaluate, not torchrun")
    if flags.report is not None:
        outputs.check_file("--report", flags.report, (".json",))
    samples = find_samples(flags, place)
    gpus = devices.gpus_for(flags.device)
    work = partial(_evaluate, flags, samples, "cuda" if gpus else "cpu")
    return ranks.run(work, nproc=1, on_cuda=bool(gpus), traceback=flags.traceback, preload=PRELOAD)


def _evaluate(flags: EvaluateFlags, samples: tuple[Sample, ...], device: str) -> None:
    # torch: not for --help, nor for a refusal
    found = import_module("clear_dist.evaluate.run").evaluate(flags, samples, device)
    written = import_module("clear_dist.evaluate.written")
    print(written.as_table([found]), end="")
    if flags.report is not None:
        for file in written.save(found, samples, flags.report):
            say(f"wrote {file}")
