"""A rank before it draws: its place, its device, its group, and the model on stripes."""

import secrets
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clear_dist import hub
from clear_dist.cards.card import Card
from clear_dist.cards.folder import card_of
from clear_dist.comm.group import Group
from clear_dist.comm.in_touch import in_touch
from clear_dist.drawing.previews import Previews
from clear_dist.drawing.prompts import nothing
from clear_dist.engine.family import Encoded, PipelineAdapter
from clear_dist.families.cards import CARDS
from clear_dist.families.transformers import adapter_of
from clear_dist.launch import env
from clear_dist.launch.ends import say
from clear_dist.observe import peaks
from clear_dist.observe.profiling import CompileTime, Profile
from clear_dist.observe.progress import Phases
from clear_dist.options import Options, Refusal
from clear_dist.parallelize import Parallelized, parallelize
from clear_dist.pictures import preview_of
from clear_dist.request.request import Lora, Request
from clear_dist.weights import loading
from clear_dist.weights.offload import offloaded_parts

SEED_BITS = 32


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One request on one rank, its model loaded."""

    request: Request
    seed: int
    device: torch.device
    group: Group
    pipe: Any
    handle: Parallelized
    phases: Phases
    began: float
    launch: float
    """Seconds until the ranks were at work."""
    encoded: list[Encoded] | None
    """Embeddings of each prompt on rank 0; None elsewhere, and where the pipeline keeps its text encoders."""
    loading_peak_bytes: int
    host_memory_bytes: int | None
    peak_since_loading: bool
    compile_time: CompileTime
    previews: Previews | None
    profile: Profile | None
    """Profile of the last stage of the first prompt."""


def prepare(request: Request, began: float, phases: Phases) -> Prepared:
    """Meet the other ranks, load the model, and put it on stripes.

    Args:
        began: wall clock at which the command was given.

    Raises:
        Refusal: only the loaded model could tell that the request is wrong.
    """
    place = env.read()
    if place.threads is not None:
        torch.set_num_threads(place.threads)  # torch may have been imported before the share was known
    device = _device(request.device, place.local_rank)
    group = Group.create(device)
    launch = time.time() - began
    with phases.phase("load", detail=" the files"):
        request = hub.locate(request, group, CARDS, local_rank=place.local_rank)
    encoded, pipe = in_touch(group, partial(_load, request, group.rank, device, phases))
    with phases.phase("load"):
        handle = _parallelize(pipe, request, group)
        load_loras(pipe, hub.local_loras(request))
    if group.rank == 0 and handle.replaced is not None and not handle.replaced.file.is_relative_to(request.model):
        say(f"CLEAR weights: {handle.replaced}")  # a model's own go without saying
    loading_peak = peaks.peak_memory(device)
    seed = group.broadcast_object(secrets.randbits(SEED_BITS) if request.seed is None else request.seed)
    torch.manual_seed(seed)
    every = request.preview_every
    return Prepared(
        request=request,
        seed=seed,
        device=device,
        group=group,
        pipe=pipe,
        handle=handle,
        phases=phases,
        began=began,
        launch=launch,
        encoded=encoded,
        loading_peak_bytes=loading_peak,
        host_memory_bytes=None if request.report is None else peaks.host_memory(),
        peak_since_loading=peaks.reset_peak_memory(device),
        compile_time=CompileTime(),
        previews=None if every is None or group.rank != 0 else Previews(preview_of(request.output), every),
        profile=_profile(request, group, handle),
    )


def _load(request: Request, rank: int, device: torch.device, phases: Phases) -> tuple[list[Encoded] | None, Any]:
    """Embeddings on rank 0, and the pipeline, without text encoders unless they are to stay.

    Nobody waits for rank 0 meanwhile, and on its device the text encoders make room for the transformer.
    """
    first, keep = rank == 0, request.keep_text_encoder
    card = card_of(Path(request.model), CARDS)
    encoded = encode_ahead(request, card, device, phases) if first and not keep else None
    with phases.phase("load", detail=" the model"):
        pipe = loading.load_pipeline(
            Path(request.model),
            card,
            with_text_encoders=first and keep,
            dtype=getattr(torch, request.dtype),
            device=device,
            on_host=parts_on_host(request, card),
            phases=phases,
        )
    return encoded, pipe


def parts_on_host(request: Request, card: Card) -> tuple[str, ...]:
    """Parts of a pipeline that `parallelize` will bring to the device as they are needed, and loading does not."""
    sharded = ("transformer",) if request.shard_weights and request.world_size > 1 else ()
    return (*(offloaded_parts(card.parts) if request.offload else ()), *sharded)


def _profile(request: Request, group: Group, handle: Parallelized) -> Profile | None:
    if request.profile is None:
        return None
    steps = request.stages[-1].sampling.steps
    return Profile(request.traces[group.rank], group.rank, steps=steps, drain=handle.drain)


def _parallelize(pipe: Any, request: Request, group: Group) -> Parallelized:
    try:
        options = {each.name: getattr(request, each.name) for each in fields(Options)}
        return parallelize(pipe, clear_weights=request.clear_weights, group=group, **options)
    except ValueError as error:
        raise Refusal(str(error)) from error


def _device(kind: str, local_rank: int) -> torch.device:
    return torch.device(kind, local_rank % torch.cuda.device_count()) if kind == "cuda" else torch.device(kind)


def load_loras(pipe: Any, loras: Iterable[Lora]) -> None:
    """Put LoRA on the pipeline's transformer and text encoders, each with its weight.

    Raises:
        Refusal: diffusers cannot read one, or would pass over a part of it.
    """
    weights = {}
    for number, lora in enumerate(loras):
        weights[f"lora_{number}"] = lora.weight
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are what is wanted
            adapter_of(pipe).load_lora(Path(lora.source), f"lora_{number}")
    on_this_rank = {name for names in pipe.get_list_adapters().values() for name in names} if weights else set()
    chosen = {name: weight for name, weight in weights.items() if name in on_this_rank}
    if chosen:
        pipe.set_adapters(list(chosen), list(chosen.values()))


def encode_ahead(request: Request, card: Card, device: torch.device, phases: Phases) -> list[Encoded]:
    """Embeddings of each prompt, in host memory; the text encoders are gone from `device` when this returns.

    Raises:
        Refusal: weights of a text encoder are missing, or do not fit their configuration.
    """
    with phases.phase("load", detail=" text encoders"):
        pipe = loading.load_text_pipeline(
            Path(request.model), card, dtype=getattr(torch, request.dtype), device=device, phases=phases
        )
        load_loras(pipe, hub.local_loras(request))
    with phases.phase("text", detail="s" if len(request.prompts) > 1 else ""):
        adapter = adapter_of(pipe)
        negative = _negative(adapter, request)
        encoded = [_positive(adapter, request, prompt) + negative for prompt in request.prompts]
    del pipe
    loading.free(device)
    return encoded


def encode_prompt(pipe: Any, request: Request, prompt: str) -> Encoded:
    """Embeddings of one prompt, by the pipeline's own text encoders."""
    adapter = adapter_of(pipe)
    return _positive(adapter, request, prompt) + _negative(adapter, request)


def _positive(adapter: PipelineAdapter, request: Request, prompt: str) -> Encoded:
    for line in adapter.too_long(prompt, request.max_sequence_length):
        say(f"warning: {line}")
    return _on_host(adapter.encode([prompt], request.max_sequence_length))


def _negative(adapter: PipelineAdapter, request: Request) -> Encoded:
    guided = max(stage.sampling.passes for stage in request.stages) > 1
    if request.negative_prompt is None or not guided:
        return nothing(adapter)
    return _on_host(adapter.encode([request.negative_prompt], request.max_sequence_length))


def _on_host(encoded: Encoded) -> Encoded:
    return [None if tensor is None else tensor.cpu() for tensor in encoded]
