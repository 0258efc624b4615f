"""What is planned: a frozen request, and what follows from it for each rank."""

from dataclasses import dataclass
from functools import cached_property

from clear_dist.geometry import HaloPlan, Rows, covering_radius, cut_in_stripes, plan_halos, plan_pooled
from clear_dist.options import Schedule, TextAttention, TextTokens, Window
from clear_dist.plan.counts import shares_of_text
from clear_dist.plan.model import ModelSizes
from clear_dist.plan.weights import WeightBytes, weights_per_rank
from clear_dist.request.hardware import Gpu, Link
from clear_dist.stages import Sampling, Size, Stage, Upscaling, plan_cascade, plan_upscaling

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """Everything that memory, bytes and time depend on. A new flag is a field here and a line where it counts."""

    model: ModelSizes
    height: int
    """Pixels, as width."""
    width: int
    native: int
    """Side of the square with as many pixels as the first stage."""
    cascade: bool = True
    sampling: Sampling
    upscaling: Upscaling
    picture: Size | None = None
    """What to start from; None: noise."""
    window: Window
    ranks: int
    gpu: Gpu | None
    """None: a CPU."""
    link: Link
    text_tokens: int = 512
    num_images: int = 1
    dtype: str = "bfloat16"
    text_attention: TextAttention = "average"
    text_sharding: TextTokens = "auto"
    """As `--text-tokens`: whether each rank takes a share of them."""
    schedule: Schedule = "sync"
    warmup_steps: int = 4
    backend: str = "auto"
    down_factor: int = 1
    """So many tokens are a side of what one down-sampled key stands for; 1: there are no such keys."""
    lora_numbers: int = 0
    """Of the weights of all LoRA together."""
    hoist_modulation: bool = False
    compile: bool = False
    float8: bool = False
    int8: bool = False
    shard_weights: bool = False
    offload: bool = False
    keep_text_encoder: bool = False
    """On rank 0, while pictures are drawn; else it is freed once prompts are encoded."""

    forked: bool = True
    """Whether ranks on a CPU come from one process, as with --nproc; torchrun's do not."""

    @property
    def on_cuda(self) -> bool:
        return self.gpu is not None

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return ITEMSIZE[self.dtype]

    @property
    def unit(self) -> int:
        """Pixels that all sides are multiples of."""
        return self.model.token * self.down_factor

    @property
    def offloads(self) -> bool:
        """Whether text encoders and VAE are in host memory, but for while they are used."""
        return self.offload and self.on_cuda

    @property
    def hoists(self) -> bool:
        """Whether modulation is in host memory."""
        return self.hoist_modulation and self.on_cuda

    @property
    def shards(self) -> int:
        """Ranks that a block's weights are spread over."""
        return self.ranks if self.shard_weights else 1

    @property
    def is_possible(self) -> bool:
        """Whether there are units of rows for all ranks, in every stage where their weights are in shards."""
        stages = self.stages if self.shards > 1 else self.stages[-1:]
        return self.ranks <= min(stage.height for stage in stages) // self.unit

    @cached_property
    def weights(self) -> WeightBytes:
        """Of the transformer on each rank."""
        return weights_per_rank(
            self.model,
            itemsize=self.itemsize,
            ranks=self.ranks,
            eight_bits=self.float8 or self.int8,
            hoisted=self.hoists,
            sharded=self.shard_weights,
        )

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """As they will be drawn."""
        size, native, token = (self.height, self.width), self.native, self.unit
        if self.picture is not None:
            return plan_upscaling(self.picture, size, native=native, token=token, upscaling=self.upscaling)
        return plan_cascade(
            size,
            native=native,
            token=token,
            sampling=self.sampling,
            upscaling=self.upscaling,
            cascade=self.cascade,
        )

    @cached_property
    def parts(self) -> tuple[tuple["Part", ...], ...]:
        """For each stage, the part of each rank; a low stage may have less parts than there are ranks."""
        return tuple(parts_of(self, stage) for stage in self.stages)

    def parts_of_rank(self, rank: int) -> tuple["Part | None", ...]:
        """Of each stage; None: the rank idles."""
        return tuple(parts[rank] if rank < len(parts) else None for parts in self.parts)


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one rank holds of one stage, all sizes in tokens; equal for ranks that need the same memory."""

    ranks: int
    """That take part."""
    rows: int
    columns: int
    height: int
    """Of the whole grid."""
    tallest: int
    """Rows of the tallest stripe."""
    above: int
    """Rows of halo."""
    below: int
    gathered: int
    """Of these, rows that are copied once more, because they come from several ranks."""
    sent: int
    """Rows, to all ranks together."""
    neighbours: int
    """Ranks next to it."""
    radius: int | None
    """None: full attention."""
    text_shares: int = 1
    """Ranks that share the text tokens; 1: all have all of them."""
    factor: int = 1
    """So many rows are one of down-sampled keys; 1: there are none."""
    pooled_gathered: int = 0
    """Rows of such keys that are copied once more."""

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    @property
    def all_tokens(self) -> int:
        return self.height * self.columns

    @property
    def received(self) -> int:
        """Rows."""
        return self.above + self.below

    @property
    def pooled_tokens(self) -> int:
        """Down-sampled keys of the whole image."""
        return self.all_tokens // self.factor**2 if self.factor > 1 else 0

    @property
    def pooled_received(self) -> int:
        """Rows of down-sampled keys: those of all other ranks."""
        return (self.height - self.rows) // self.factor if self.factor > 1 else 0

    @property
    def pooled_sent(self) -> int:
        """Rows of down-sampled keys: mine, to all other ranks."""
        return (self.ranks - 1) * self.rows // self.factor if self.factor > 1 else 0


def parts_of(request: PlanRequest, stage: Stage) -> tuple[Part, ...]:
    """The stripes of a stage."""
    token, unit = request.model.token, request.down_factor
    height, columns = stage.height // token, stage.width // token
    stripes = cut_in_stripes(height, min(request.ranks, height // unit), unit=unit)
    radius = None if request.window == "full" else min(request.window, covering_radius(height, columns))
    shares = shares_of_text(
        request.text_tokens,
        height * columns,
        len(stripes),
        "stale" if lags(request, stage, len(stripes)) else "sync",
        request.text_sharding,
    )
    return tuple(
        _part(request, stripes, plan_halos(stripes, rank, radius), rank, columns, radius, shares)
        for rank in range(len(stripes))
    )


def _part(
    request: PlanRequest,
    stripes: tuple[Rows, ...],
    plan: HaloPlan,
    rank: int,
    columns: int,
    radius: int | None,
    text_shares: int,
) -> Part:
    above, below = _rows_from_each(plan)
    factor = request.down_factor if radius is not None else 1
    pooled = _rows_from_each(plan_pooled(stripes, rank, factor)) if factor > 1 else ()
    return Part(
        ranks=len(stripes),
        rows=len(plan.own),
        columns=columns,
        height=stripes[-1].stop,
        tallest=max(map(len, stripes)),
        above=sum(above),
        below=sum(below),
        gathered=sum(sum(side) for side in (above, below) if len(side) > 1),
        sent=sum(len(transfer.rows) for transfer in plan.sends),
        neighbours=(plan.own.start > 0) + (plan.own.stop < stripes[-1].stop),
        radius=radius,
        text_shares=text_shares,
        factor=factor,
        pooled_gathered=sum(sum(side) for side in pooled if len(side) > 1),
    )


def _rows_from_each(plan: HaloPlan) -> tuple[list[int], list[int]]:
    """How many rows come from each owner above, and from each below."""
    sides: tuple[list[int], list[int]] = ([], [])
    for transfer in plan.receives:
        sides[transfer.rows.start >= plan.own.stop].append(len(transfer.rows))
    return sides


def lags(request: PlanRequest, stage: Stage, ranks: int) -> bool:
    """Whether the stale schedule is in force in a stage on so many ranks: one that is all warm-up keeps nothing."""
    return request.schedule == "stale" and ranks > 1 and max(1, request.warmup_steps) < stage.sampling.steps


def is_upper(stage: Stage) -> bool:
    """Whether a stage starts from a picture."""
    return isinstance(stage.sampling, Upscaling)
