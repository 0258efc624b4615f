"""What is planned: a frozen request, and what follows from it for each rank."""

from dataclasses import dataclass
from functools import cached_property

from clear_dist.config import Schedule, TextAttention, Window
from clear_dist.geometry import HaloPlan, Rows, covering_radius, cut_in_stripes, plan_halos
from clear_dist.planning.hardware import Gpu, Link
from clear_dist.planning.model import ModelSizes
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
    schedule: Schedule = "sync"
    warmup_steps: int = 4
    backend: str = "flex"
    hoist_modulation: bool = False
    compile: bool = False
    float8: bool = False
    int8: bool = False
    shard_weights: bool = False
    keep_text_encoder: bool = True
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

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """As they will be drawn."""
        size, native, token = (self.height, self.width), self.native, self.model.token
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


def parts_of(request: PlanRequest, stage: Stage) -> tuple[Part, ...]:
    """The stripes of a stage."""
    token = request.model.token
    height, columns = stage.height // token, stage.width // token
    stripes = cut_in_stripes(height, min(request.ranks, height))
    radius = None if request.window == "full" else min(request.window, covering_radius(height, columns))
    return tuple(_part(plan_halos(stripes, rank, radius), stripes, columns, radius) for rank in range(len(stripes)))


def _part(plan: HaloPlan, stripes: tuple[Rows, ...], columns: int, radius: int | None) -> Part:
    sides: tuple[list[int], list[int]] = ([], [])
    for transfer in plan.receives:
        sides[transfer.rows.start >= plan.own.stop].append(len(transfer.rows))
    return Part(
        ranks=len(stripes),
        rows=len(plan.own),
        columns=columns,
        height=stripes[-1].stop,
        tallest=max(map(len, stripes)),
        above=sum(sides[0]),
        below=sum(sides[1]),
        gathered=sum(sum(side) for side in sides if len(side) > 1),
        sent=sum(len(transfer.rows) for transfer in plan.sends),
        neighbours=(plan.own.start > 0) + (plan.own.stop < stripes[-1].stop),
        radius=radius,
    )


def lags(request: PlanRequest, stage: Stage, part: Part) -> bool:
    """Whether the stale schedule is in force in a stage: a stage that is all warm-up keeps nothing."""
    stale = request.schedule == "stale" and part.ranks > 1
    return stale and max(1, request.warmup_steps) < stage.sampling.steps


def is_upper(stage: Stage) -> bool:
    """Whether a stage starts from a picture."""
    return isinstance(stage.sampling, Upscaling)
