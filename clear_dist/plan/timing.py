"""How long a request takes, roughly: work over rates that are assumed, and bytes over a link. Nothing here is measured.

computing = products / rate + visited pairs / rate + passes over memory / bandwidth
exposed   = max(0, bytes in layers / link - what computing hides) + join / link
step      = computing + exposed

Weights in shards travel beside the messages, all but the first block's behind computing.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from clear_dist.geometry import reached_tiles
from clear_dist.plan.choice import DENSE, backend_of
from clear_dist.plan.counts import Part as Share
from clear_dist.plan.counts import attended_pairs, linear_work, own_text, pooled_pairs
from clear_dist.plan.kernels import TILE
from clear_dist.plan.request import Part, PlanRequest, is_upper
from clear_dist.plan.traffic import (
    VaeTraffic,
    counted,
    decode_traffic,
    encode_traffic,
    schedule_of,
    share_of,
    step_traffic,
)
from clear_dist.plan.vae import Layer, decoder, encoder
from clear_dist.request.hardware import Gpu
from clear_dist.stages import Stage

PRODUCTS = 0.7
"""Of a GPU's peak, that large products of matrices reach: 700 of an H100's 989 TFLOP/s."""
WINDOW_KERNEL = 0.27
"""Of the peak, on the pairs that are visited: FlexAttention's 267 TFLOP/s, which explain CLEAR's published times."""
FULL_KERNEL = 0.55
"""Of the peak, as FlashAttention reaches it on an H100."""
CONVOLUTIONS = 0.3
MEMORY = 0.8
"""Of the bandwidth of a GPU's memory."""
EIGHT_BITS = 1.6
"""How many times as fast products in float8 are; their peak is twice as high."""
UNPACKING = 11
"""Bytes read and written for a number in int8, by two kernels, until it is one of 16 bits; then products read it."""
PASSES, PASSES_COMPILED = 110, 40
"""Numbers read and written per channel, token and block outside of products; the first one is counted."""
HIDDEN = {"sync": 0.5, "stale": 1.0}
"""Share of a step's computing behind which its messages can hide."""


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """Seconds of one stage, on the rank that has most to do."""

    computing: float
    """Of a step."""
    exposed: float
    """Of a step: waiting for messages."""
    steps: int
    encode: float
    decode: float

    @property
    def step(self) -> float:
        return self.computing + self.exposed

    @property
    def total(self) -> float:
        return self.steps * self.step + self.encode + self.decode


def stage_time(request: PlanRequest, stage: Stage, parts: tuple[Part, ...]) -> StageTime | None:
    """Of one stage; None: on a CPU or a GPU whose rates are not known."""
    gpu = request.gpu
    if gpu is None or not gpu.flops:
        return None
    rank = max(range(len(parts)), key=lambda rank: (parts[rank].rows, parts[rank].received))
    part, link = parts[rank], request.link.bytes_per_second
    computing = _computing(request, gpu, stage, rank, part)
    sent = step_traffic(request, stage, rank, part)
    hidden = HIDDEN[schedule_of(request, stage, part)] * computing
    messages, weights = sent.in_layers / link, sent.weights / link
    first_block = weights / request.model.layers
    exposed = max(0.0, messages - hidden, messages + weights - computing) + first_block + sent.at_the_end / link
    encode = 0.0
    if is_upper(stage):
        encode = _vae(request, gpu, part, encoder(request, part), encode_traffic(request, part))
    return StageTime(
        computing=computing,
        exposed=exposed,
        steps=stage.sampling.steps,
        encode=encode,
        decode=_vae(request, gpu, part, decoder(request, part), decode_traffic(request, part)),
    )


def assumptions(request: PlanRequest) -> tuple[str, ...]:
    """What the estimate rests on, a line each, for people."""
    gpu = request.gpu
    if gpu is None or not gpu.flops:
        return (f"no time is estimated for {'CPUs' if gpu is None else gpu.name}",)
    kernels = f"windowed attention reaches {WINDOW_KERNEL:.0%} on the tiles of {TILE[0]}x{TILE[1]} tokens it visits"
    if request.window == "full":
        kernels = f"full attention reaches {FULL_KERNEL:.0%}"
    elif request.down_factor > 1:
        kernels += f", that to down-sampled keys {FULL_KERNEL:.0%}"
    faster = f", and {EIGHT_BITS:g} times as much in 8 bits" if eight_bit_products(request) else ""
    unpacked = f"; unpacking weights in int8 takes {UNPACKING} bytes a number" if request.int8 else ""
    weights = "; weights in shards behind all of it but the first block" if request.shards > 1 else ""
    return (
        f"{gpu.name}: {gpu.flops / 1e12:.0f} TFLOP/s in 16 bits, {gpu.bandwidth / 1e9:.0f} GB/s of memory (data sheet)",
        f"products of matrices reach {PRODUCTS:.0%} of that{faster}",
        kernels,
        f"between products {passes(request)} numbers per channel, token and block pass through memory, "
        f"at {MEMORY:.0%} of its rate{unpacked}",
        f"link {request.link.name}: {request.link.bytes_per_second / 1e9:g} GB/s each way; messages hide behind "
        f"{HIDDEN[request.schedule]:.0%} of computing{weights}",
        "loading, encoding the prompt, compiling and writing files are left out",
    )


def eight_bit_products(request: PlanRequest) -> bool:
    """Whether products run at a higher rate."""
    return request.float8 and request.gpu is not None and request.gpu.float8


def passes(request: PlanRequest) -> int:
    return PASSES_COMPILED if request.compile else PASSES


def _computing(request: PlanRequest, gpu: Gpu, stage: Stage, rank: int, part: Part) -> float:
    model, share = counted(request), share_of(request, stage, rank, part)
    schedule, asked = schedule_of(request, stage, part), request.text_sharding
    own = own_text(model, share, schedule, asked)
    rate = gpu.flops * PRODUCTS * (EIGHT_BITS if eight_bit_products(request) else 1)
    products = linear_work(model, share, schedule, asked) / rate
    memory = gpu.bandwidth * MEMORY
    moved = passes(request) * (part.tokens + own) * model.channels * model.layers * request.itemsize / memory
    attention = _attention_seconds(request, gpu, part, share, own)
    for_each_picture = products + attention + moved
    unpacked = UNPACKING * request.model.products / memory if request.int8 else 0.0
    return stage.sampling.passes * (request.num_images * for_each_picture + unpacked)


def _attention_seconds(request: PlanRequest, gpu: Gpu, part: Part, share: Share, own: int) -> float:
    """Of all layers, for one picture and pass."""
    full, rate = part.radius is None, gpu.flops / (4 * request.model.channels * request.model.layers)
    if full:
        return attended_pairs(request.text_tokens, share, own_text=own) / (rate * FULL_KERNEL)
    return visited_pairs(request, part) / (rate * WINDOW_KERNEL) + pooled_pairs(share) / (rate * FULL_KERNEL)


def visited_pairs(request: PlanRequest, part: Part) -> float:
    """Pairs of query and key that a kernel computes in one layer: whole tiles wherever a circle touches one.

    Tiles at the border are counted as if there were more beyond it, which is up to 8 % too many.
    """
    text, tokens = request.text_tokens, part.tokens
    assert part.radius is not None, "full attention visits what it wants"
    if backend_of(request, part) in DENSE:
        halos = sum(min(part.rows, rows) * rows for rows in (part.above, part.below)) * part.columns**2
        return (text + tokens) * (text + tokens) + halos
    size = TILE[0] * TILE[1]
    tiles = ceil(part.rows / TILE[0]) * ceil(part.columns / TILE[1])
    keys = size * sum(map(len, reached_tiles(part.radius, TILE, TILE).values()))
    return text * (text + tokens) + tiles * size * (text + min(keys, part.all_tokens))


def _vae(request: PlanRequest, gpu: Gpu, part: Part, layers: Iterable[Layer], sent: VaeTraffic) -> float:
    work = 0.0
    for layer in layers:
        if layer.kind == "attention":
            work += _attention_work(part, layer) / FULL_KERNEL
        else:
            work += _convolution_work(layer) / CONVOLUTIONS
    messages = (sent.rows_sent + (part.ranks - 1) * sent.gathered) / request.link.bytes_per_second
    return request.num_images * work / gpu.flops + messages


def _convolution_work(layer: Layer) -> float:
    """Operations of a layer's 3x3 convolutions, and of the 1x1 one of a shortcut."""
    pairs = 9 * layer.inputs * layer.outputs
    if layer.kind == "resnet":
        pairs += 9 * layer.outputs**2 + layer.inputs * layer.outputs * (layer.inputs != layer.outputs)
    return 2 * pairs * layer.rows * layer.columns * layer.zoom**2


def _attention_work(part: Part, layer: Layer) -> float:
    """Operations of attention over the whole picture, and of its four projections."""
    mine = layer.rows * layer.columns
    whole = part.height * layer.rows // part.rows * layer.columns
    return 4 * mine * whole * layer.inputs + 8 * mine * layer.inputs**2
