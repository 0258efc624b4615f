"""How long a request takes, roughly: work over rates that are assumed, and bytes over a link. Nothing here is measured.

computing = products / rate + visited pairs / rate + passes over memory / bandwidth
host      = what the host starts x seconds for each; next to nothing in steps that are replayed as CUDA graphs
exposed   = max(0, bytes in layers / link - what the longer of both hides) + join / link
step      = max(computing, host) + exposed

Weights in shards travel beside the messages, all but the first block's behind computing.
"""

from dataclasses import dataclass

from clear_dist.plan.asked import Part, PlanRequest
from clear_dist.plan.engine import Engine
from clear_dist.plan.questions import Step, VaePass, Weights
from clear_dist.plan.traffic import step_traffic
from clear_dist.request.hardware import Gpu
from clear_dist.stages import Stage

TILE = (8, 16)
"""Tokens of FlexAttention's tiles, for people."""
PRODUCTS = 0.7
"""Share of a GPU's peak that large products of matrices reach: 700 of an H100's 989 TFLOP/s."""
WINDOW_KERNEL = 0.27
"""Share of the peak on visited pairs: FlexAttention's 267 TFLOP/s, which explain CLEAR's published times."""
FULL_KERNEL = 0.55
"""Share of the peak that FlashAttention reaches on an H100."""
CONVOLUTIONS = 0.3
MEMORY = 0.8
"""Share of a GPU's memory bandwidth."""
EIGHT_BITS = 1.6
"""How many times as fast products in float8 are; their peak is twice as high."""
UNPACKING = 11
"""Bytes read and written for a number in int8, by two kernels, until it is one of 16 bits; then products read it."""
PASSES = 19
"""Numbers read and written per channel, token and block outside of products by our kernels, which all GPUs with rates
run; counted (tests/cuda/test_passes.py)."""
LAUNCH = 5e-6
"""Seconds of the host to start a kernel, a product of matrices or a group of messages from Python: assumed."""
LAUNCHES = 19
"""Such starts in a block of a pass on one rank; counted, as the next two, on GPUs that are not there (figures.md)."""
LAUNCHES_OF_MESSAGES = 11
"""More on each of several ranks: parts of attention and their merging, messages, shares of text."""
LAUNCHES_IN_8_BITS = {"int8": (15, 7), "float8": (59, 7)}
"""More for weights in 8 bits, as they are and compiled, which changes nothing for others."""
LAUNCHES_REPLAYED = 10
"""Starts in a whole pass that is a CUDA graph."""
LAUNCHED = 2
"""Passes before a graph is replayed: the first compiles kernels, the second captures the graph."""
HIDDEN = {"sync": 0.5, "stale": 1.0}
"""Share of a step's computing behind which its messages can hide."""


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """Seconds of one stage, on the rank that has most to do."""

    computing: float
    """A step's, as the next two."""
    host: float
    """The host's, to start all kernels, or a graph of them."""
    exposed: float
    """Waiting for messages."""
    capturing: float
    """What the host takes longer than a step's computing before there is a graph."""
    steps: int
    all_passes: int
    """Steps in which ranks take two passes, and one in each of the others."""
    encode: float
    decode: float

    @property
    def step(self) -> float:
        return max(self.computing, self.host) + self.exposed

    @property
    def total(self) -> float:
        return (self.steps + self.all_passes) * self.step + self.capturing + self.encode + self.decode


def stage_time(engine: Engine, asked: PlanRequest, number: int) -> StageTime | None:
    """Times of one stage; None: on a CPU or a GPU of unknown rates."""
    gpu, stage = asked.gpu, asked.stages[number]
    if gpu is None or not gpu.flops:
        return None
    part = max(asked.parts[number], key=lambda part: (part.rows, part.received))
    step, weights = engine.step(asked, stage, part), engine.weights(asked)
    images, passes = asked.images(stage), asked.passes(stage)
    computing, link = _computing(asked, gpu, step, weights, images, passes), asked.link.bytes_per_second
    launched = LAUNCH * launches(asked, part.stripes) * weights.blocks
    is_graph = step.grids == 1 and is_replayed(asked, stage, part, copies=step.copies)
    host = passes * (LAUNCH * LAUNCHES_REPLAYED if is_graph else launched)
    capturing = LAUNCHED * max(0.0, launched - computing / passes) if is_graph else 0.0
    net, net_weights = engine.control_step(asked, stage, part), engine.control_weights(asked)
    if net is not None and net_weights is not None:
        computing += _computing(asked, gpu, net, net_weights, asked.request.images_at_once, 1)
        host += LAUNCH * (LAUNCHES_REPLAYED if is_graph else launches(asked, part.stripes) * net_weights.blocks)
    busy, sent = max(computing, host), step_traffic(engine, asked, stage, part)
    hidden = HIDDEN["stale" if asked.lags(stage, part.stripes) else "sync"] * busy
    messages, shares = sent.in_layers / link, sent.weights / link
    first_block = shares / weights.blocks
    exposed = max(0.0, messages - hidden, messages + shares - busy) + first_block + sent.at_the_end / link
    encode, decode = (
        _vae(asked, gpu, engine.vae(asked, part, encode=encode), part.ranks) if wanted else 0.0
        for encode, wanted in ((True, stage.starts_from_picture), (False, True))
    )
    waits = {"exposed": exposed, "capturing": capturing, "encode": encode, "decode": decode}
    # The first step, on each grid, tells how many there are.
    both = step.grids if asked.has_halves(stage) and not asked.model.guides_in_one_pass else 0
    return StageTime(computing=computing, host=host, steps=stage.sampling.steps, all_passes=both, **waits)


def assumptions(asked: PlanRequest) -> tuple[str, ...]:
    """What the estimate rests on, a line each, for people."""
    gpu, request = asked.gpu, asked.request
    if gpu is None or not gpu.flops:
        return (f"no time is estimated for {'CPUs' if gpu is None else gpu.name}",)
    kernels = (
        f"windowed attention reaches {WINDOW_KERNEL:.0%} on the tiles of {TILE[0]}x{TILE[1]} tokens it visits, "
        f"that of text {FULL_KERNEL:.0%}"
    )
    if request.window == "full":
        kernels = f"full attention reaches {FULL_KERNEL:.0%}"
    elif request.down_factor > 1:
        kernels += f", that to down-sampled keys {FULL_KERNEL:.0%}"
    faster = f", and {EIGHT_BITS:g} times as much in 8 bits" if eight_bit_products(asked) else ""
    unpacked = f"; unpacking weights in int8 takes {UNPACKING} bytes a number" if request.int8 else ""
    graphs = ", but for few tokens, replayed as CUDA graphs" if request.cuda_graphs == "auto" else ""
    weights = "; weights in shards behind all of it but the first block" if asked.in_shards else ""
    return (
        f"{gpu.name}: {gpu.flops / 1e12:.0f} TFLOP/s in 16 bits, {gpu.bandwidth / 1e9:.0f} GB/s of memory (data sheet)",
        f"products of matrices reach {PRODUCTS:.0%} of that{faster}",
        kernels,
        f"between products {PASSES} numbers per channel, token and block pass through memory, "
        f"at {MEMORY:.0%} of its rate{unpacked}",
        f"the host starts {launches(asked, asked.ranks)} kernels, products and messages a block, "
        f"at {LAUNCH * 1e6:g} us each{graphs}",
        f"link {asked.link.name}: {asked.link.bytes_per_second / 1e9:g} GB/s each way; messages hide behind "
        f"{HIDDEN[request.schedule]:.0%} of computing{weights}",
        "loading, encoding the prompt, compiling and writing files are left out",
    )


def eight_bit_products(asked: PlanRequest) -> bool:
    """Whether products run at a higher rate."""
    return asked.request.float8 and asked.gpu is not None and asked.gpu.float8


def launches(asked: PlanRequest, ranks: int) -> int:
    """Kernels, products and groups of messages that the host starts in a block of a pass, without graphs."""
    eight_bits = (LAUNCHES_IN_8_BITS[kind] for kind in LAUNCHES_IN_8_BITS if getattr(asked.request, kind))
    return LAUNCHES + LAUNCHES_OF_MESSAGES * (ranks > 1) + sum(more[asked.request.compile] for more in eight_bits)


def is_replayed(asked: PlanRequest, stage: Stage, part: Part, *, copies: int) -> bool:
    """Whether all steps but the first are CUDA graphs, which a rank in need of host memory for messages has none of."""
    request, passes = asked.request, asked.passes(stage)
    tokens = asked.images(stage) * (part.rows * part.columns + copies * asked.text_tokens)
    backend = None if request.radius is None else request.attention_backend
    to_come = stage.sampling.steps - (LAUNCHED - 1) // passes
    may_replay = asked.options.may_replay(ranks=part.stripes, tokens=tokens, steps=to_come, backend=backend)
    return may_replay and asked.on_cuda and asked.transport != "host"


def _computing(asked: PlanRequest, gpu: Gpu, step: Step, weights: Weights, images: int, passes: int) -> float:
    rate, memory = gpu.flops * PRODUCTS * (EIGHT_BITS if eight_bit_products(asked) else 1), gpu.bandwidth * MEMORY
    numbers = images * passes * step.tokens * step.channels * weights.blocks
    moved = PASSES * numbers * asked.itemsize / memory
    unpacked = passes * UNPACKING * weights.products / memory if asked.request.int8 else 0.0
    window = 4 * step.channels * step.operations.get("visited", 0) / (gpu.flops * WINDOW_KERNEL)
    full = step.operations.get("attention", 0) / (gpu.flops * FULL_KERNEL)
    return step.operations["products"] / rate + window + full + moved + unpacked


def _vae(asked: PlanRequest, gpu: Gpu, work: VaePass, ranks: int) -> float:
    convolutions = work.operations["convolutions"] / CONVOLUTIONS
    attention = (work.operations.get("attention", 0) + work.operations.get("products", 0)) / FULL_KERNEL
    messages = work.bytes["other_bytes"] + (ranks - 1) * work.bytes["join_bytes"]
    return (convolutions + attention) / gpu.flops + messages / asked.link.bytes_per_second
