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
from clear_dist.engine.family import Encoded
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
    """Meet the other ranks, load the model, and put it on stripes; `began` is wall clock.

    Raises a Refusal where only the loaded model could tell that the request is wrong.
    """
    place = env.read()
    if place.threads is not None:
        torch.set_num_threads(place.threads)  # torch may have been imported before the share was known
    device = torch.device(request.device)
    if device.type == "cuda":
        device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
    group = Group.create(device)
    launch = time.time() - began
    with phases.phase("load", detail=" the files"):
        request = hub.locate(request, group, CARDS, local_rank=place.local_rank)
    encoded, pipe = in_touch(group, partial(_load, request, group.rank, device, phases))
    with phases.phase("load"):
        try:
            options = {each.name: getattr(request, each.name) for each in fields(Options)}
            handle = parallelize(pipe, clear_weights=request.clear_weights, group=group, **options)
        except ValueError as error:
            raise Refusal(str(error)) from error
        load_loras(pipe, hub.local_loras(request))
    if group.rank == 0 and handle.replaced is not None and not handle.replaced.file.is_relative_to(request.model):
        say(f"CLEAR weights: {handle.replaced}")  # a model's own go without saying
    loading_peak = peaks.peak_memory(device)
    seed = group.broadcast_object(secrets.randbits(SEED_BITS) if request.seed is None else request.seed)
    torch.manual_seed(seed)
    every, profile = request.preview_every, None
    if request.profile is not None:
        steps = request.stages[-1].sampling.steps
        profile = Profile(request.traces[group.rank], group.rank, steps=steps, drain=handle.drain)
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
        profile=profile,
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


def load_loras(pipe: Any, loras: Iterable[Lora]) -> None:
    """Put LoRA on the pipeline's transformer and text encoders, each with its weight; raises as `load_lora`."""
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
    """Embeddings of each prompt; the text encoders are gone from `device` afterwards. Raises as `load_pipeline`."""
    with phases.phase("load", detail=" text encoders"):
        pipe = loading.load_text_pipeline(
            Path(request.model), card, dtype=getattr(torch, request.dtype), device=device, phases=phases
        )
        load_loras(pipe, hub.local_loras(request))
    with phases.phase("text", detail="s" if len(request.prompts) > 1 else ""):
        encoded = encode(pipe, request, request.prompts)
    del pipe
    loading.free(device)
    return encoded


def encode(pipe: Any, request: Request, prompts: Iterable[str]) -> list[Encoded]:
    """Embeddings of each prompt and of the negative one, in host memory, by the pipeline's text encoders."""
    adapter, most = adapter_of(pipe), request.max_sequence_length
    is_guided = max(stage.sampling.passes for stage in request.stages) > 1
    negative = nothing(adapter)
    if request.negative_prompt is not None and is_guided:
        negative = adapter.encode([request.negative_prompt], most)
    encoded = []
    for prompt in prompts:
        for line in adapter.too_long(prompt, most):
            say(f"warning: {line}")
        both = (*adapter.encode([prompt], most), *negative)
        encoded.append([None if tensor is None else tensor.cpu() for tensor in both])
    return encoded
