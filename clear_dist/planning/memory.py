"""Memory of a rank by item: what it holds all the time, and what each phase of its work adds."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from clear_dist.planning.blocks import step_bytes
from clear_dist.planning.request import Part, PlanRequest, is_upper, lags
from clear_dist.planning.step import FLOAT32, Step
from clear_dist.planning.vae import PICTURE_CHANNELS, decode_bytes, encode_bytes
from clear_dist.planning.weights import text_encoder_bytes, transformer_bytes, vae_bytes
from clear_dist.stages import Stage

SENDING_LAYERS = 8
"""Whose messages may be on their way out by the stale schedule; models/room.py has the same."""
CONTEXT = 600_000_000
"""Of CUDA, cuBLAS and cuDNN on a GPU: assumed, not measured."""
CHANNELS_OF_NCCL = 400_000_000
"""Of NCCL's groups, where there are several ranks: assumed, not measured."""
LIBRARIES, FORKED = 630_000_000, 450_000_000
"""Of Python, torch, diffusers and transformers in a process on a CPU, and in one of several forked ranks, which
touch less of them: measured, benchmarks/plan.py."""
SHARED = 370_000_000
"""Of these, what forked ranks have in common: pages of files, and of the process that they come from."""
SHAREABLE = ("transformer", "VAE")
"""Weights that ranks on a CPU may have in common too, if they are read from files in the dtype that is asked for."""

Items = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What a rank holds in one phase of one stage, where it holds most."""

    name: str
    stage: int
    """Its number; -1: before all stages."""
    items: Items
    """Bytes by name: weights first."""
    where: str = ""
    """The moment at which most is alive."""

    @property
    def total(self) -> int:
        return sum(self.items.values())


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Of one rank."""

    rank: int
    phases: tuple[Phase, ...]

    @property
    def peak(self) -> int:
        """Bytes."""
        return self.largest.total

    @property
    def largest(self) -> Phase:
        """The phase with the peak."""
        return max(self.phases, key=lambda phase: phase.total)


def rank_memory(request: PlanRequest, rank: int) -> RankMemory:
    """Of one rank, in all phases."""
    return RankMemory(rank=rank, phases=(*_text_phase(request, rank), *_stages(request, rank)))


def held_bytes(request: PlanRequest, rank: int) -> Items:
    """What a rank holds while pictures are drawn, whatever their size."""
    held = {"transformer": transformer_bytes(request), "VAE": vae_bytes(request)}
    if rank == 0 and request.keep_text_encoder:
        held["text encoders"] = text_encoder_bytes(request)
    return {**held, **_surroundings(request)}


def _surroundings(request: PlanRequest) -> Items:
    if request.on_cuda:
        return {"CUDA": CONTEXT + CHANNELS_OF_NCCL * (request.ranks > 1)}
    return {"libraries": FORKED if request.forked and request.ranks > 1 else LIBRARIES}


def _text_phase(request: PlanRequest, rank: int) -> Iterator[Phase]:
    """Encoding the prompt, on rank 0: T5's scores or its widest layer."""
    if rank:
        return
    kept = held_bytes(request, rank) if request.keep_text_encoder else _surroundings(request)
    text, tokens = request.model.text, request.num_images * request.text_tokens
    scores = text.heads * tokens * request.text_tokens * (3 * request.itemsize + FLOAT32)
    hidden = 3 * tokens * text.hidden * request.itemsize
    activations = max(scores, hidden) + 4 * tokens * text.channels * request.itemsize
    items = {**kept, "text encoders": text_encoder_bytes(request), "text activations": activations}
    yield Phase(name="text", stage=-1, items=items)


def _stages(request: PlanRequest, rank: int) -> Iterator[Phase]:
    held = held_bytes(request, rank)
    before: Items = {}
    for number, (stage, part) in enumerate(zip(request.stages, request.parts_of_rank(rank), strict=True)):
        if part is None:
            yield Phase(name="idle", stage=number, items=held)
            continue
        kept = {**held, **before}
        if is_upper(stage):
            encoding = {**kept, "VAE activations": encode_bytes(request, part)}
            yield Phase(name="encode", stage=number, items=encoding)
        step = step_of(request, stage, part)
        yield _denoising(step, number, kept)
        drawn = {"latents": 3 * latents_of(step)}
        decoding = {**kept, **drawn, "VAE activations": decode_bytes(request, part)}
        yield Phase(name="decode", stage=number, items=decoding)
        saving = {**held, **drawn, "picture": picture_bytes(request, rank, part)}
        yield Phase(name="save", stage=number, items=saving)
        before = {"stage before": pixels_of(request, part) + latents_of(step)}


def _denoising(step: Step, number: int, kept: Items) -> Phase:
    most = step_bytes(step)
    items = {**kept, "activations": most.activations, "attention": most.attention, **exchanged(step)}
    items["latents"] = latent_bytes(step)
    return Phase(name="denoise", stage=number, items=items, where=most.where)


def step_of(request: PlanRequest, stage: Stage, part: Part) -> Step:
    """A step of a stage, as its memory needs it."""
    return Step(
        request=request,
        part=part,
        upper=is_upper(stage),
        lag=lags(request, stage, part),
        passes=stage.sampling.passes,
        steps=stage.sampling.steps,
    )


def exchanged(step: Step) -> Items:
    """Halos as they arrive and leave; by the stale schedule those of all layers and passes."""
    request, part = step.request, step.part
    row = 2 * step.bytes_of(part.columns)
    if step.lag:
        layers = request.model.layers * step.passes
        halos = layers * row * part.received
        on_their_way = min(SENDING_LAYERS + 1, layers * step.steps)
        return {"stale halos": halos, "halos on their way": on_their_way * row * part.sent}
    return {"halos": row * (part.received + part.gathered + part.sent)}


def latents_of(step: Step) -> int:
    """Of all tokens, once."""
    return step.batch * step.part.all_tokens * step.request.model.latent_channels * step.request.itemsize


def latent_bytes(step: Step) -> int:
    """Latents, what the model puts out, the join of stripes, and what a picture was encoded to."""
    request, part, whole = step.request, step.part, latents_of(step)
    token = step.batch * request.model.latent_channels * request.itemsize
    join = (part.ranks + 1) * part.tallest * part.columns * token
    mine = part.tokens * token if part.ranks > 1 else 0
    start = whole + whole * FLOAT32 // request.itemsize if step.upper else 0
    embeddings = step.passes * step.batch * step.text * request.model.text_channels * request.itemsize
    return (1 + step.passes) * whole + join + mine + start + embeddings + _tables(step)


def _tables(step: Step) -> int:
    """Of hoisted modulation: what it is in all steps."""
    request = step.request
    if not (request.hoist_modulation and request.on_cuda):
        return 0
    steps = max(stage.sampling.steps for stage in request.stages)
    return steps * step.passes * step.batch * request.model.modulation_outputs * request.itemsize


def pixels_of(request: PlanRequest, part: Part) -> int:
    """Of a stripe, as the VAE puts it out."""
    return request.num_images * PICTURE_CHANNELS * part.tokens * request.model.token**2 * request.itemsize


def picture_bytes(request: PlanRequest, rank: int, part: Part) -> int:
    """The stripe's pixels, and one picture of them on its way to bytes; on rank 0 another rank's bytes."""
    values = PICTURE_CHANNELS * part.tokens * request.model.token**2
    floats = 1 if request.itemsize == FLOAT32 else 2
    one = values * (floats * FLOAT32 + 1 * (floats == 1))
    others = 0
    if rank == 0 and part.ranks > 1:
        others = prod((2, PICTURE_CHANNELS, part.tallest, part.columns, request.model.token**2))
    return pixels_of(request, part) + max(one, 2 * values + others)
