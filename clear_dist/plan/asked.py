"""What is planned: a request, where it is to run, and the parts that ranks have in its stages."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from math import prod, sqrt
from pathlib import Path
from typing import Any, Literal

from clear_dist.cards.headers import read_shapes
from clear_dist.cards.lora import TEXT_PREFIX
from clear_dist.geometry import HaloPlan, Rows, Striping, bands_of, covering_radius, cut_in_stripes, plan_halos, touched
from clear_dist.options import Options
from clear_dist.plan.model import PlannedModel
from clear_dist.request.hardware import Gpu, Link
from clear_dist.request.request import Lora, Request
from clear_dist.stages import Size, Stage, Upscaling, on_ranks

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A rank's stripe in a stage, in rows of tokens; where stripes are runs of columns, of the transposed picture."""

    ranks: int
    """Ranks that take part in the stage."""
    stripes: int
    """Those of the transformer: fewer than ranks where halves share guidance."""
    rank: int
    rows: int
    halos: tuple[tuple[int, ...], tuple[int, ...]]
    """Rows from each rank on one side, and on the other: above or below, in such an order that equal parts match."""
    sent: int
    """Rows, to all other ranks together."""
    texts: tuple[tuple[int, bool], ...]
    """For each band of blocks whose copies of the text the rank holds: how many do, and whether it is the first."""
    columns: int
    picture_rows: int
    """Those of the picture itself that the rank has in the VAE."""
    picture_columns: int

    @property
    def received(self) -> int:
        return sum(map(sum, self.halos))

    @property
    def holders(self) -> int:
        return sum(number for number, _ in self.texts)

    @property
    def shape(self) -> tuple[object, ...]:
        """Equal for ranks that need the same."""
        return self.rows, self.halos, self.sent, self.texts, self.picture_rows

    def covers(self, other: "Part") -> bool:
        """Whether the other one needs no more than this one."""
        halos = self.received >= other.received and self.sent >= other.sent
        texts = len(self.texts) >= len(other.texts) and self.holders >= other.holders
        return halos and texts and self.rows >= other.rows and self.picture_rows >= other.picture_rows


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """A settled request on ranks of one kind."""

    request: Request
    """Its size is known."""
    model: PlannedModel
    gpu: Gpu | None
    """None: a CPU."""
    link: Link
    forked: bool = True
    """Whether ranks on a CPU come from one process, as with --nproc; torchrun's do not."""
    shares_gpus: bool = False
    """Whether several ranks are on one GPU, so that messages go through host memory."""
    stage_ranks: Mapping[Size, int] = field(default_factory=dict)
    """Ranks of stages that not all draw, by size."""

    def changed(self, **fields: Any) -> "PlanRequest":
        """A copy with other fields of the request, and all ranks in every stage."""
        return replace(self, request=replace(self.request, **fields), stage_ranks={})

    @property
    def ranks(self) -> int:
        """Ranks that draw a picture together."""
        return self.request.ranks

    @property
    def text_tokens(self) -> int:
        """Those of a picture that is looked at, too, which are attended to alike."""
        looked_at = 0 if self.reference is None else prod(self.reference)
        return self.request.max_sequence_length + self.model.further_text_tokens + looked_at

    @property
    def reference(self) -> Size | None:
        """Rows and columns of tokens of the picture that is looked at, which each rank encodes whole."""
        picture, area = self.request.picture, self.model.reference_area
        if picture is None or area is None or not self.request.looks:
            return None
        shrink = min(1.0, sqrt(area / prod(picture.size)))
        height, width = (max(1, int(side * shrink) // self.model.token) for side in picture.size)
        return height, width

    def passes(self, stage: Stage) -> int:
        """Forwards of a step, on a rank."""
        return 1 if self.model.guides_in_one_pass or self.has_halves(stage) else stage.sampling.passes

    def images(self, stage: Stage) -> int:
        """Batch of a forward, on a rank."""
        passes = 1 if self.has_halves(stage) else stage.sampling.passes
        return self.request.images_at_once * passes // self.passes(stage)

    def has_halves(self, stage: Stage) -> bool:
        """Whether each half of the ranks takes a pass of a stage's guidance, or half of its batch."""
        is_guided = self.request.negative_prompt is not None and stage.sampling.passes > 1
        return self.request.guidance_ranks == 2 and is_guided and self._drawing(stage) == self.ranks

    def shifts(self, stage: Stage) -> bool:
        """Whether even steps may have their patches half a token off: all but whether the model can take that."""
        upper = self._led(stage)
        return upper is not None and upper.way.shifts

    def text_block(self, stage: Stage) -> int | None:
        """Side in tokens of the blocks that each have a copy of the text, where the model can take that; None: none."""
        upper = self._led(stage)
        return None if upper is None or not upper.way.copies else (self.request.native_size or 0) // self.model.token

    def _led(self, stage: Stage) -> Upscaling | None:
        """A stage above the native size whose way may change what the model is given; None: it may not."""
        request, upper = self.request, stage.sampling
        if not isinstance(upper, Upscaling) or prod(stage.size) <= (request.native_size or 0) ** 2:
            return None
        is_alone = request.control is None and self.reference is None
        return upper if is_alone and request.schedule == "sync" else None

    @property
    def on_cuda(self) -> bool:
        return self.gpu is not None

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return ITEMSIZE[self.request.dtype]

    @property
    def transport(self) -> Literal["nccl", "gloo", "host"]:
        return "gloo" if not self.on_cuda else "host" if self.shares_gpus else "nccl"

    @property
    def offloads(self) -> bool:
        """Whether text encoders and VAE are in host memory, but for while they are used."""
        return self.request.offload and self.on_cuda

    @property
    def hoists(self) -> bool:
        """Whether modulation is in host memory."""
        return self.request.hoist_modulation and self.on_cuda

    @property
    def keeps_modulation_apart(self) -> bool:
        """Whether it is in no shard and in no block: on a CPU that has shards too, where it stays whole."""
        return self.hoists or (self.request.hoist_modulation and self.in_shards)

    @property
    def in_shards(self) -> bool:
        return self.request.shard_weights and self.ranks > 1

    @property
    def options(self) -> Options:
        """What the engine is given."""
        given = {each.name: getattr(self.request, each.name) for each in fields(Options)}
        return Options(**given | {"hoist_modulation": self.hoists, "offload": False})

    @cached_property
    def lora_numbers(self) -> int:
        """Numbers in the weights that all LoRA together add to the transformer."""
        return sum(map(_numbers, self.request.loras))

    @property
    def kind(self) -> dict[str, Any]:
        """Kind of numbers and of device, as questions name them."""
        return {"dtype": self.request.dtype, "device": self.request.device}

    @property
    def is_possible(self) -> bool:
        """Whether there are tokens for all ranks, in every stage where their weights are in shards."""
        request, stages = self.request, self.stages if self.in_shards else self.stages[-1:]
        if request.world_size % request.data_ranks or (request.guidance_ranks == 2 and self.ranks % 2):
            return False
        return self.ranks <= min(request.most_ranks(stage.size) for stage in stages)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        return on_ranks(self.request.stages, self.stage_ranks)

    @cached_property
    def parts(self) -> tuple[tuple[Part, ...], ...]:
        """For each stage, the part of each rank; a low stage may have fewer parts than there are ranks."""
        return tuple(self._parts_of(stage) for stage in self.stages)

    def striping(self, stage: Stage) -> Striping:
        """A stage as the transformer has it: where halves share guidance, each has all of it."""
        return self.request.striping(stage.size, self._drawing(stage) // (2 if self.has_halves(stage) else 1))

    def _drawing(self, stage: Stage) -> int:
        """Ranks that draw a stage."""
        return stage.ranks_among(self.ranks, self.request.most_ranks(stage.size))

    def lags(self, stage: Stage, ranks: int) -> bool:
        """Whether halos lag in a stage on so many ranks: one that is all warm-up keeps nothing."""
        return ranks > 1 and self.request.lags_within(stage.sampling.steps)

    def _parts_of(self, stage: Stage) -> tuple[Part, ...]:
        image, radius = self.striping(stage), self.request.radius
        height, width = stage.height // self.model.token, stage.width // self.model.token
        if radius is not None:
            radius = min(radius, covering_radius(height, width))
        in_vae, stripes = cut_in_stripes(height, self._drawing(stage)), image.stripes
        shifts = self.shifts(stage) and self.request.down_factor == 1
        larger = cut_in_stripes(stripes[-1].stop + 1, len(stripes)) if shifts else stripes  # of both grids
        bands = bands_of(larger[-1].stop, None if radius is None else self.text_block(stage))
        held = [touched(bands, stripe) for stripe in larger]
        return tuple(
            _part(plan_halos(stripes, rank % len(stripes), radius), rank, image, in_vae, held, width)
            for rank in range(len(in_vae))
        )


def _part(
    plan: HaloPlan, rank: int, image: Striping, in_vae: tuple[Rows, ...], held: Sequence[Rows], picture_columns: int
) -> Part:
    sides: tuple[list[int], list[int]] = ([], [])
    for transfer in plan.receives:
        sides[transfer.rows.start >= plan.own.stop].append(len(transfer.rows))
    first, second = sorted(tuple(sorted(side)) for side in sides)
    sent = sum(len(transfer.rows) for transfer in plan.sends)
    mine = rank % len(held)
    holders = [[other for other, bands in enumerate(held) if band in bands.numbers] for band in held[mine].numbers]
    return Part(
        ranks=len(in_vae),
        stripes=len(image.stripes),
        rank=rank,
        rows=len(plan.own),
        halos=(first, second),
        sent=sent,
        texts=tuple((len(ranks), ranks[0] == mine) for ranks in holders),
        columns=image.width,
        picture_rows=len(in_vae[rank]),
        picture_columns=picture_columns,
    )


def _numbers(lora: Lora) -> int:
    """Numbers in the weights that a LoRA adds to the transformer; 0 where its file is not here yet."""
    if not os.path.isfile(lora.source):
        return 0
    shapes = read_shapes(Path(lora.source))
    return sum(prod(shape) for name, shape in shapes.items() if not TEXT_PREFIX.match(name))
