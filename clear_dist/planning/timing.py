"""How long a request takes, roughly: work over rates that are assumed, and bytes over a link. Nothing here is measured.

computing = products / rate + visited pairs / rate + passes over memory / bandwidth
exposed   = max(0, bytes in layers / link - what computing hides) + join / link
step      = computing + exposed
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from clear_dist.geometry import reached_tiles
from clear_dist.planning.counts import attended_pairs, attention_work, linear_work
from clear_dist.planning.hardware import Gpu
from clear_dist.planning.kernels import TILE
from clear_dist.planning.request import Part, PlanRequest, is_upper, lags
from clear_dist.planning.traffic import (
    VaeTraffic,
    counted,
    decode_traffic,
    encode_traffic,
    share_of,
    step_traffic,
)
from clear_dist.planning.vae import Layer, decoder, encoder
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
    hidden = HIDDEN["stale" if lags(request, stage, part) else "sync"] * computing
    exposed = max(0.0, sent.in_layers / link - hidden) + sent.at_the_end / link
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
    full = request.window == "full"
    return (
        f"{gpu.name}: {gpu.flops / 1e12:.0f} TFLOP/s in 16 bits, {gpu.bandwidth / 1e9:.0f} GB/s of memory (data sheet)",
        f"products of matrices reach {PRODUCTS:.0%} of that"
        + (f", and {EIGHT_BITS:g} times as much in 8 bits" if eight_bit_products(request) else ""),
        f"full attention reaches {FULL_KERNEL:.0%}"
        if full
        else f"windowed attention reaches {WINDOW_KERNEL:.0%} on the tiles of {TILE[0]}x{TILE[1]} tokens it visits",
        f"between products {passes(request)} numbers per channel, token and block pass through memory, "
        f"at {MEMORY:.0%} of its rate",
        f"link {request.link.name}: {request.link.bytes_per_second / 1e9:g} GB/s each way; messages hide behind "
        f"{HIDDEN[request.schedule]:.0%} of computing",
        "loading, encoding the prompt, compiling and writing files are left out",
    )


def eight_bit_products(request: PlanRequest) -> bool:
    """Whether products run at a higher rate."""
    return request.float8 and request.gpu is not None and request.gpu.float8


def passes(request: PlanRequest) -> int:
    return PASSES_COMPILED if request.compile else PASSES


def _computing(request: PlanRequest, gpu: Gpu, stage: Stage, rank: int, part: Part) -> float:
    model, share = counted(request), share_of(request, stage, rank, part)
    rate = gpu.flops * PRODUCTS * (EIGHT_BITS if eight_bit_products(request) else 1)
    products = linear_work(model, share) / rate
    visited = visited_pairs(request, part) / attended_pairs(model.text_tokens, share, own_text=model.text_tokens)
    kernel = FULL_KERNEL if part.radius is None else WINDOW_KERNEL * visited**-1
    attention = attention_work(model, share) / (gpu.flops * kernel)
    tokens = part.tokens + request.text_tokens
    moved = passes(request) * tokens * model.channels * model.layers * request.itemsize
    times = stage.sampling.passes * request.num_images
    return times * (products + attention + moved / (gpu.bandwidth * MEMORY))


def visited_pairs(request: PlanRequest, part: Part) -> float:
    """Pairs of query and key that a kernel computes in one layer: whole tiles wherever a circle touches one.

    Tiles at the border are counted as if there were more beyond it, which is up to 8 % too many.
    """
    text, tokens = request.text_tokens, part.tokens
    if part.radius is None:
        return (text + tokens) * (text + part.all_tokens)
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
