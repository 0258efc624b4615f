"""A rank before it draws: its place, its device, its group, and the model on stripes."""

import gc
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clear_dist import hub
from clear_dist.cards.card import Card
from clear_dist.cards.folder import card_of, read_folder
from clear_dist.comm.group import Group
from clear_dist.comm.in_touch import in_touch
from clear_dist.comm.mesh import image_group
from clear_dist.comm.process_groups import device_of
from clear_dist.commands.resuming import Resuming
from clear_dist.drawing.previews import Previews
from clear_dist.drawing.prompts import nothing
from clear_dist.engine.family import Encoded
from clear_dist.families.cards import CARDS
from clear_dist.families.transformers import adapter_of
from clear_dist.launch import env
from clear_dist.launch.aside import in_background
from clear_dist.launch.ends import say
from clear_dist.launch.env import Place
from clear_dist.observe import peaks
from clear_dist.observe.profiling import CompileTime, Profile
from clear_dist.observe.progress import Phases
from clear_dist.options import Options, Refusal, Window
from clear_dist.parallelize import parallelize, require_machine
from clear_dist.pictures import preview_of
from clear_dist.plan import fit_here
from clear_dist.plan.choice import Fewer, Halves, may_have_halves, may_use_fewer
from clear_dist.request.notes import sharing
from clear_dist.request.outputs import require_free
from clear_dist.request.request import Control, Request
from clear_dist.weights import loading
from clear_dist.weights.lora import load_loras
from clear_dist.weights.offload import offloaded_parts

Choice = tuple[Halves | None, tuple[Fewer, ...]]
BETWEEN_MESSAGES, WHILE_OTHERS_DRAW = 600.0, 30 * 86_400.0
"""Seconds that all ranks wait for each other; those of other pictures may draw for long before they meet again."""


class Prepared:
    """One request on one rank, its model loaded."""

    def __init__(self, request: Request, began: float, phases: Phases, taken: Path | None = None) -> None:
        """Meet the other ranks, load the model, and put it on stripes; `began` is wall clock.

        `taken` is an output that another job will write, as rank 0 finds out.

        Raises a Refusal where only the loaded model could tell that the request is wrong.
        """
        place = env.read()
        self.device = device = _settle_on(request.device, place)
        self.began, self.phases = began, phases
        self.everyone, self.group = everyone, group = met(request, device)
        """All ranks, and those that draw this rank's pictures."""
        self.launch = time.time() - began
        """Seconds until the ranks were at work."""
        require_free(everyone.broadcast_object(taken))
        with refusing():
            require_machine(options_of(request), device, getattr(torch, request.dtype))
        with phases.phase("load", detail=" the files"):
            self.request = request = hub.locate(request, everyone, CARDS, local_rank=place.local_rank)
        self.resuming = Resuming.of(request, everyone)
        self.data_rank = everyone.rank // group.size
        self.mine = request.drawn_by(self.data_rank)
        """Prompts of this rank's group, and which pictures of each it draws."""
        is_open = may_use_fewer(request) or may_have_halves(request)
        choice = choosing(request, place) if everyone.rank == 0 and is_open else None
        self.encoded, self.pipe = in_touch(everyone, partial(_load, request, group.rank, self.mine, device, phases))
        """Embeddings of each prompt that is mine on a group's rank 0; None where the pipeline keeps its encoders."""
        with phases.phase("load"):
            self._choose(None if choice is None else choice.result())
            options, weights = options_of(self.request), request.clear_weights
            with refusing():
                given: dict[str, Any] = {"clear_weights": weights, "controlnet_window": window_of(request.control)}
                self.handle = parallelize(self.pipe, options, group=group, **given)
            load_loras(self.pipe, hub.local_loras(request), CARDS)
        replaced = self.handle.replaced
        if everyone.rank == 0 and replaced is not None and not replaced.file.is_relative_to(request.model):
            say(f"CLEAR weights: {replaced}")  # a model's own go without saying
        self.loading_peak_bytes = peaks.peak_memory(device)
        self.seed = everyone.broadcast_object(self.resuming.chosen_seed())
        torch.manual_seed(self.seed)
        self.host_memory_bytes = None if request.report is None else peaks.host_memory()
        self.peak_since_loading = peaks.reset_peak_memory(device)
        self.compile_time = CompileTime()
        every, self.previews, self.profile = request.preview_every, None, None
        if every is not None and everyone.rank == 0:
            self.previews = Previews(preview_of(request.output), every)
        if request.profile is not None:  # of the last stage of the first prompt
            steps = request.stages[-1].sampling.steps
            self.profile = Profile(request.traces[everyone.rank], everyone.rank, steps=steps, drain=self.handle.drain)

    def _choose(self, choice: Choice | None) -> None:
        """Take what rank 0 has found to be sooner, and tell people."""
        halves, fewer = self.everyone.broadcast_object(choice) or (None, ())
        self.fewer: tuple[Fewer, ...] = fewer
        """Stages that not all ranks draw."""
        if halves is not None:
            self.request = replace(self.request, guidance_ranks=2)
        for each in (*((halves,) if halves is not None else ()), *fewer) if self.everyone.rank == 0 else ():
            say(each.words(averages=self.request.text_attention == "average"))


def met(request: Request, device: torch.device) -> tuple[Group, Group]:
    """All ranks, and those that draw this rank's pictures."""
    everyone = Group.create(
        device,
        timeout_seconds=WHILE_OTHERS_DRAW if request.data_ranks > 1 else BETWEEN_MESSAGES,
        join_seconds=request.join_timeout,
        share_gpus=request.share_gpus,
    )
    group = image_group(everyone, request.data_ranks)
    for line in sharing(group.transport) if everyone.rank == 0 else ():
        say(line)
    return everyone, group


def options_of(request: Request) -> Options:
    return Options(**{each.name: getattr(request, each.name) for each in fields(Options)})


def _settle_on(kind: str, place: Place) -> torch.device:
    """The rank's device; it gets its share of threads, and a CPU's memory from layer to layer."""
    if place.threads is not None:
        torch.set_num_threads(place.threads)  # torch may have been imported before the share was known
    device = device_of(kind, place.local_rank)
    peaks.keep_for_the_next_layer(device)
    return device


def choosing(request: Request, place: Place) -> "Future[Choice]":
    """Begin to find out, beside loading, whether halves share guidance, and which stages fewer ranks draw sooner."""
    facts = read_folder(Path(request.model), CARDS, request.files)
    return in_background(partial(fit_here.chosen_here, request, facts, place))


@contextmanager
def refusing() -> Iterator[None]:
    """Context in which a ValueError is the request's fault."""
    try:
        yield
    except ValueError as error:
        raise Refusal(str(error)) from error


def _load(
    request: Request, rank: int, mine: Iterable[int], device: torch.device, phases: Phases
) -> tuple[dict[int, Encoded] | None, Any]:
    """Embeddings of prompts `mine` on rank 0, and the pipeline, without text encoders unless they are to stay.

    Nobody waits for rank 0 meanwhile, and on its device the text encoders make room for the transformer.
    """
    first, keep = rank == 0, request.keep_text_encoder
    card = card_of(Path(request.model), CARDS)
    encoded = encode_ahead(request, mine, card, device, phases) if first and not keep else None
    on_host = parts_on_host(request, card)
    with phases.phase("load", detail=" the model"):
        pipe = loading.load_pipeline(
            Path(request.model),
            card,
            with_text_encoders=first and keep,
            dtype=getattr(torch, request.dtype),
            device=device,
            on_host=on_host,
            phases=phases,
            files=request.files,
        )
        if (controlnet := hub.local_controlnet(request)) is not None:
            place = loading.HOST if "transformer" in on_host else device
            dtype, kinds = getattr(torch, request.dtype), CARDS.controlnets[card.pipeline]
            pipe = loading.with_controlnet(pipe, controlnet, kinds, dtype=dtype, device=place, phases=phases)
    return encoded, pipe


def parts_on_host(request: Request, card: Card) -> tuple[str, ...]:
    """Parts of a pipeline that `parallelize` will bring to the device as they are needed, and loading does not."""
    in_shards = request.shard_weights and request.world_size > 1
    changed = in_shards or request.int8 or request.float8 or request.hoist_modulation
    return (*(offloaded_parts(card.parts) if request.offload else ()), *(("transformer",) if changed else ()))


def window_of(control: Control | None) -> Window | None:
    return None if control is None else control.window


def encode_ahead(
    request: Request, mine: Iterable[int], card: Card, device: torch.device, phases: Phases
) -> dict[int, Encoded]:
    """Embeddings of prompts `mine`; the text encoders are gone from `device` afterwards. Raises as `load_pipeline`."""
    with phases.phase("load", detail=" text encoders"):
        pipe = loading.load_text_pipeline(
            Path(request.model),
            card,
            dtype=getattr(torch, request.dtype),
            device=device,
            phases=phases,
            files=request.files,
        )
        load_loras(pipe, hub.local_loras(request), CARDS)
    with phases.phase("text", detail="s" if len(request.prompts) > 1 else ""):
        encoded = dict(zip(mine, encode(pipe, request, mine), strict=True))
    del pipe
    gc.collect()
    peaks.give_back(device)
    return encoded


def encode(pipe: Any, request: Request, indices: Iterable[int]) -> list[Encoded]:
    """Embeddings of each prompt and its negative one, in host memory, by the pipeline's text encoders."""
    adapter, most = adapter_of(pipe), request.max_sequence_length
    is_guided = max(stage.sampling.passes for stage in request.stages) > 1
    negatives: dict[str | None, Encoded] = {None: nothing(adapter)}
    encoded = []
    for index in indices:
        prompt, negative = request.prompts[index], request.alone(index).negative_prompt if is_guided else None
        if negative is not None and negative not in negatives:
            _tell_too_long("the negative prompt", adapter.too_long(negative, most))
            negatives[negative] = adapter.encode([negative], most)
        _tell_too_long("the prompt", adapter.too_long(prompt, most))
        both = (*adapter.encode([prompt], most), *negatives[negative])
        encoded.append([None if tensor is None else tensor.cpu() for tensor in both])
    return encoded


def _tell_too_long(name: str, lines: Iterable[str]) -> None:
    for line in lines:
        say(f"warning: {name} is {line}")
