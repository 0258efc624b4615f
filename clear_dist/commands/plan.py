"""`clear-dist plan`: what a `generate` would take, before anything is loaded and without a GPU."""

import json as json_format
from dataclasses import replace
from typing import Any

from rich.console import Console

from clear_dist import preflight
from clear_dist.comm import env
from clear_dist.commands import options
from clear_dist.config import FLUX_DEV, Refusal
from clear_dist.config.plan import PlanConfig
from clear_dist.config.rules import check_choice
from clear_dist.planning import GPUS, LINKS, Gpu, Plan, Room, nearest, record
from clear_dist.planning.shown import show_plan, show_sweep
from clear_dist.preflight import devices, fit, planned, sizes

NO_FIT = 2
"""As for any request that is wrong."""
SWEPT = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
"""Numbers of ranks."""


def plan(
    res: options.Res = None,
    height: options.Pixels = None,
    width: options.Pixels = None,
    gpu: options.GpuKind = "auto",
    link: options.LinkKind = "auto",
    nproc: options.PlannedRanks = None,
    sweep: options.Sweep = False,
    json: options.Json = False,
    steps: options.Steps = None,
    true_cfg_scale: options.TrueCfgScale = None,
    max_sequence_length: options.MaxSequenceLength = None,
    num_images: options.NumImages = 1,
    cascade: options.Cascade = "auto",
    base_res: options.BaseRes = None,
    strength: options.Strength = None,
    upscale_steps: options.UpscaleSteps = None,
    model: options.Model = "auto",
    clear_weights: options.ClearWeights = "auto",
    lora: options.Lora = None,
    window: options.Window = None,
    hoist_modulation: options.HoistModulation = False,
    compile: options.Compile = False,
    float8: options.Float8 = False,
    keep_text_encoder: options.KeepTextEncoder = False,
    int8: options.Int8 = False,
    shard_weights: options.ShardWeights = False,
    offload: options.Offload = False,
    dtype: options.Dtype = "auto",
    text_attention: options.TextAttention = None,
    text_tokens: options.TextTokens = "auto",
    schedule: options.Schedule = "sync",
    warmup_steps: options.WarmupSteps = None,
    attention_backend: options.AttentionBackend = "auto",
    traceback: options.Traceback = False,
) -> int:
    """What a `generate` with these flags takes: stripes, memory, bytes, time, and whether it fits. Nothing is loaded.

    The exit status is 0 if it fits, and 2 if it does not.
    """
    config = PlanConfig(**locals())
    first = planned_for(config)
    if not config.sweep:
        change = None if first.fits else nearest(first)
        return _tell(config, show_plan, record.of_plan, first, change, fits=first.fits)
    plans = [plan for ranks in SWEPT if (plan := _with_ranks(first, ranks)).request.is_possible]
    return _tell(config, show_sweep, record.of_sweep, plans, fits=any(each.fits for each in plans))


def planned_for(config: PlanConfig) -> Plan:
    """The plan of one request; raises a Refusal where it is wrong, or the sizes of its model are not known."""
    config = replace(config, gpu=config.gpu.lower(), link=config.link.lower())
    check_choice("--gpu", config.gpu, ("auto", "cpu", *GPUS))
    check_choice("--link", config.link, ("auto", *LINKS))
    found = devices.find_gpus() if config.gpu == "auto" else ()
    gpu = _gpu(config, found)
    device = "cpu" if gpu is None else "cuda"
    place = env.read()
    request, facts, _ = preflight.choose(config, place, device=device, gpus=len(found))
    known = sizes.find(facts)
    if known is None:
        raise Refusal(
            f"--model must be in a folder, or one whose configuration is known, got {config.model}; nearest: {FLUX_DEV}"
        )
    word = config.link
    if word == "auto":
        word = fit.ON_CPU if gpu is None else gpu.link
    whole = planned.of_request(request, known, gpu, LINKS[word], place)
    return Plan(request=whole, room=_room(gpu, whole.ranks))


def _gpu(config: PlanConfig, found: tuple[devices.FoundGpu, ...]) -> Gpu | None:
    """The kind that was asked for, or that is here; None: a CPU."""
    if found:
        return replace(fit.kind_of(found[0]), memory=found[0].total)
    if config.gpu == "cpu" or (config.gpu == "auto" and config.model == "demo"):
        return None
    return next(iter(GPUS.values())) if config.gpu == "auto" else GPUS[config.gpu]


def _room(gpu: Gpu | None, ranks: int) -> Room:
    return fit.room_of((), ranks) if gpu is None else Room(bytes=gpu.memory, where=gpu.name)


def _with_ranks(first: Plan, ranks: int) -> Plan:
    return Plan(request=replace(first.request, ranks=ranks), room=_room(first.request.gpu, ranks))


def _tell(config: PlanConfig, shown: Any, recorded: Any, *about: Any, fits: bool) -> int:
    """On stdout, for people or for programs; returns the exit status."""
    if config.json:
        print(json_format.dumps(recorded(*about), indent=1))
    else:
        shown(Console(highlight=False), *about)
    return 0 if fits else NO_FIT
