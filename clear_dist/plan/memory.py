"""Memory of a rank by item: what it holds all the time, and what each phase of its work adds."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from clear_dist.plan.blocks import step_bytes
from clear_dist.plan.kernels import MASKS_KEPT, masks_of
from clear_dist.plan.request import Part, PlanRequest, is_upper, lags
from clear_dist.plan.step import FLOAT32, Step
from clear_dist.plan.vae import PICTURE_CHANNELS, decode_bytes, encode_bytes
from clear_dist.stages import Stage

SENDING_LAYERS = 8
"""Whose messages may be on their way out by the stale schedule; engine/room.py has the same."""
CONTEXT = 600_000_000
"""Of CUDA, cuBLAS and cuDNN on a GPU: assumed, not measured."""
CHANNELS_OF_NCCL = 400_000_000
"""Of NCCL's groups, where there are several ranks: assumed, not measured."""
LIBRARIES, FORKED = 630_000_000, 450_000_000
"""Of Python, torch, diffusers and transformers in a process on a CPU, and in one of several forked ranks, which
touch less of them: measured, benchmarks/memory/plan.py."""
SHARED = 370_000_000
"""Of these, what forked ranks have in common: pages of files, and of the process that they come from."""
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
    as_stored: int = 0
    """Of weights on a CPU, what ranks may have in common: the files' pages, if those have the dtype asked for."""

    @property
    def total(self) -> int:
        return sum(self.items.values())


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Of one rank."""

    rank: int
    phases: tuple[Phase, ...]

    @property
    def before(self) -> Phase:
        """The largest phase before anything is drawn."""
        return max((phase for phase in self.phases if phase.stage < 0), key=lambda phase: phase.total)

    @property
    def drawing(self) -> Phase:
        """The largest one after that."""
        return max((phase for phase in self.phases if phase.stage >= 0), key=lambda phase: phase.total)

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
    return RankMemory(rank=rank, phases=(*_before(request, rank), *_stages(request, rank)))


def held_bytes(request: PlanRequest, rank: int) -> dict[str, int]:
    """What a rank holds while pictures are drawn, whatever their size."""
    return _loaded(request, rank, request.weights.held) | _adapters(request) | _surroundings(request)


def text_encoder_bytes(request: PlanRequest) -> int:
    """Of the text encoders, which only rank 0 has."""
    return request.model.text.numbers * request.itemsize


def pinned_bytes(request: PlanRequest) -> int:
    """Of the modulation that all ranks of a machine keep in its host's memory, each its own."""
    return request.ranks * request.model.modulation * request.itemsize * request.hoists


def _loaded(request: PlanRequest, rank: int, transformer: int) -> dict[str, int]:
    items = {"transformer": transformer}
    if not request.offloads:
        items["VAE"] = request.model.vae.numbers * request.itemsize
        if rank == 0 and request.keep_text_encoder:
            items["text encoders"] = text_encoder_bytes(request)
    return items


def _adapters(request: PlanRequest) -> dict[str, int]:
    """LoRA come after shards are made, and stay whole."""
    return {"LoRA": request.lora_numbers * request.itemsize} if request.lora_numbers else {}


def _surroundings(request: PlanRequest) -> dict[str, int]:
    if request.on_cuda:
        return {"CUDA": CONTEXT + CHANNELS_OF_NCCL * (request.ranks > 1)}
    return {"libraries": FORKED if request.forked and request.ranks > 1 else LIBRARIES}


def _with_vae(request: PlanRequest, items: Items) -> Items:
    """While it is used it is there in any case."""
    return {**items, "VAE": request.model.vae.numbers * request.itemsize}


def _before(request: PlanRequest, rank: int) -> Iterator[Phase]:
    """Rank 0 encodes the prompt; the others have loaded by then, and wait. What is made smaller is loaded whole."""
    kept = request.keep_text_encoder
    if rank:
        yield _phase(request, "wait", -1, held_bytes(request, rank))
    else:
        around = held_bytes(request, rank) if kept else _surroundings(request)
        encoders = {"text encoders": text_encoder_bytes(request), "text activations": _text_activations(request)}
        yield _phase(request, "text", -1, {**around, **encoders})
    whole = request.model.numbers * request.itemsize
    if request.shards == 1 and request.weights.held < whole:  # shards come from host memory, block by block
        yield _phase(request, "load", -1, _loaded(request, rank, whole) | _surroundings(request))


def _text_activations(request: PlanRequest) -> int:
    """T5's scores or its widest layer."""
    text, tokens = request.model.text, request.text_tokens  # a prompt at a time, whatever is drawn of it
    scores = text.heads * tokens**2 * (3 * request.itemsize + FLOAT32)
    hidden = 3 * tokens * text.hidden * request.itemsize
    return max(scores, hidden) + 4 * tokens * text.channels * request.itemsize


def _phase(request: PlanRequest, name: str, stage: int, items: Items, where: str = "") -> Phase:
    as_stored = 0
    if not request.on_cuda and "transformer" in items:
        as_stored = (items["transformer"] if name == "load" else request.weights.as_stored) + items["VAE"]
    return Phase(name=name, stage=stage, items=items, where=where, as_stored=as_stored)


def _stages(request: PlanRequest, rank: int) -> Iterator[Phase]:
    held = held_bytes(request, rank)
    masks: tuple[int, ...] = ()
    before: Items = {}
    for number, (stage, part) in enumerate(zip(request.stages, request.parts_of_rank(rank), strict=True)):
        if part is None:
            yield _phase(request, "idle", number, held)
            continue
        kept = {**held, **before}
        if is_upper(stage):
            encoding = {**_with_vae(request, kept), "VAE activations": encode_bytes(request, part)}
            yield _phase(request, "encode", number, encoding)
        step = step_of(request, stage, part)
        masks = (*masks, *masks_of(step))[-MASKS_KEPT:]
        if masks:
            held["masks"] = kept["masks"] = sum(masks)
        yield _denoising(step, number, kept)
        drawn = {"latents": 3 * latents_of(step)}
        decoding = {**_with_vae(request, kept), **drawn, "VAE activations": decode_bytes(request, part)}
        yield _phase(request, "decode", number, decoding)
        saving = {**held, **drawn, "picture": picture_bytes(request, rank, part)}
        yield _phase(request, "save", number, saving)
        before = {"stage before": pixels_of(request, part) + latents_of(step)}


def _denoising(step: Step, number: int, kept: Items) -> Phase:
    most = step_bytes(step)
    gathered = {"blocks gathered": step.request.weights.gathered} if step.request.shards > 1 else {}
    items = {**kept, **gathered, "activations": most.activations, "attention": most.attention, **exchanged(step)}
    items["latents"] = latent_bytes(step)
    return _phase(step.request, "denoise", number, items, most.where)


def step_of(request: PlanRequest, stage: Stage, part: Part) -> Step:
    """A step of a stage, as its memory needs it."""
    return Step(
        request=request,
        part=part,
        upper=is_upper(stage),
        lag=lags(request, stage, part.ranks),
        passes=stage.sampling.passes,
        steps=stage.sampling.steps,
    )


def exchanged(step: Step) -> Items:
    """Halos and down-sampled rows as they arrive and leave, by the stale schedule of all layers and passes; text."""
    request, part = step.request, step.part
    row = 2 * step.bytes_of(part.columns)
    pooled = row // part.factor
    received = row * part.received + pooled * part.pooled_received
    sent = row * part.sent + pooled * part.pooled_sent
    if step.lag:
        layers = request.model.layers * step.passes
        on_their_way = min(SENDING_LAYERS + 1, layers * step.steps)
        copied = {"pooled keys": pooled * part.pooled_gathered} if part.pooled_tokens else {}
        return {"stale halos": layers * received, "halos on their way": on_their_way * sent, **copied}
    items = {"halos": row * (part.received + part.gathered + part.sent)}
    if part.pooled_tokens and part.ranks > 1:
        items["pooled keys"] = pooled * (part.pooled_received + part.pooled_gathered + part.pooled_sent)
    if part.text_shares > 1:  # queries, keys and values of mine and of all; parts of the output, to and from all
        items["text"] = step.bytes_of(step.own_text, 3 * (1 + part.ranks) + part.ranks) + step.bytes_of(step.text)
    return items


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
    if not request.hoists:
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
