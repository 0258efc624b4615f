"""`clear-dist generate`: pictures from a prompt."""

import time
from functools import partial
from importlib import import_module
from pathlib import Path

from clear_dist import preflight
from clear_dist.comm import ends, env, launch
from clear_dist.commands import options
from clear_dist.config import GenerateConfig, Request


def generate(
    prompt: options.Prompt = None,
    prompts: options.Prompts = None,
    res: options.Res = None,
    height: options.Pixels = None,
    width: options.Pixels = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    negative_prompt: options.NegativePrompt = None,
    true_cfg_scale: options.TrueCfgScale = None,
    max_sequence_length: options.MaxSequenceLength = None,
    seed: options.Seed = None,
    num_images: options.NumImages = 1,
    model: options.Model = "auto",
    revision: options.Revision = None,
    clear_weights: options.ClearWeights = "auto",
    window: options.Window = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    nproc: options.Nproc = None,
    text_attention: options.TextAttention = None,
    schedule: options.Schedule = "sync",
    attention_backend: options.AttentionBackend = "auto",
    output: options.Output = Path("clear-dist.png"),
    latents_out: options.LatentsOut = None,
    report: options.Report = None,
    traceback: options.Traceback = False,
) -> int:
    """Draw pictures from a prompt, on one rank or many. No argument is required."""
    return run(GenerateConfig(**locals()))


def run(config: GenerateConfig) -> int:
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
