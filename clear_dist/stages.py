"""Stages of a cascade: heights and widths in pixels at which a picture is drawn, and how each is denoised.

A large picture is drawn at the native size, then enlarged and refined, stage by stage (paper, Sec. 4.3).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import ceil, log2, sqrt
from typing import Literal

from clear_dist.refining import REFINEMENTS, Refinement

Size = tuple[int, int]
AtStages = Literal["upper"] | int
"""Stages that a LoRA works in: those that refine, or of so many pixels along the longer side and more."""
NTK = ("plain", "clipped")
"""Ways of lowering a rotary embedding's frequencies above the native size."""

SPARE_DOUBLINGS = 0.1
"""Stages enlarge 2 times, or up to 2.14 times where rounding to whole tokens asks for it."""
ROUNDING = 1e-6
"""Tokens by which a root may fall short of a whole number."""
LEAST_SHARE_OF_NATIVE = 0.5
"""Shorter side of a long, thin base picture, in native sizes: models don't draw slivers."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Denoising of a stage; raises ValueError for less than a step."""

    steps: int = 28
    guidance_scale: float = 3.5
    """Distilled guidance; no effect on models that take none."""
    true_cfg_scale: float = 1.0
    """Classifier-free guidance with a negative prompt; 1: none."""

    @property
    def passes(self) -> int:
        return 2 if self.true_cfg_scale > 1 else 1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}; nearest: 1")


@dataclass(frozen=True, kw_only=True)
class FromPicture(Sampling):
    """Denoising of a picture with noise; raises ValueError for a strength outside (0, 1]."""

    strength: float = 0.6
    """Share of noise in the picture: 1 leaves nothing of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.strength <= 1:
            nearest = 1 if self.strength > 1 else 0.1
            raise ValueError(f"strength must be above 0 and at most 1, got {self.strength}; nearest: {nearest}")


@dataclass(frozen=True, kw_only=True)
class ImageToImage(FromPicture):
    """A user's picture in the first stage, as in diffusers' image-to-image: `steps` are the last of `schedule`."""

    schedule: int
    """Steps from noise alone."""

    @classmethod
    def of(cls, sampling: Sampling, strength: float | None = None) -> "ImageToImage":
        """As many steps as diffusers takes of those of `sampling`; None: its usual strength."""
        share, schedule = cls.strength if strength is None else strength, sampling.steps
        steps = schedule - int(max(schedule - min(schedule * share, schedule), 0))
        return cls(**vars(sampling) | {"steps": max(1, steps)}, strength=share, schedule=schedule)


@dataclass(frozen=True, kw_only=True)
class Upscaling(FromPicture):
    """Refinement of an enlarged picture, by default as in CLEAR's notebook; raises ValueError as its way."""

    steps: int = 14
    """Steps of every stage, the notebook's 20 x 0.7; `strength` decides where they begin."""
    guidance_scale: float = 7.5
    strength: float = 0.7
    ntk_factor: float = 10.0
    """Factor of the rotary embedding's base above the native size."""
    ntk: Literal["plain", "clipped"] = "plain"
    """clipped: no frequency below the stock embedding's / sqrt(tokens / native tokens), as in I-Max's code."""
    interpolate_positions: bool = False
    refinement: str = "sdedit"
    """A way of refining, from `REFINEMENTS`."""
    later_steps: int | None = None
    """Steps of upper stages after the first one; None: `steps`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refinement not in REFINEMENTS:
            known = ", ".join(REFINEMENTS)
            raise ValueError(f"refinement must be one of {known}, got {self.refinement!r}; nearest: sdedit")
        if self.ntk not in NTK:
            raise ValueError(f"ntk must be one of {', '.join(NTK)}, got {self.ntk!r}; nearest: {NTK[0]}")
        self.way.check(self.steps)
        if self.later_steps is not None:
            replace(self, steps=self.later_steps, later_steps=None)  # raises as for any steps

    @property
    def way(self) -> Refinement:
        return REFINEMENTS[self.refinement]

    def above(self, steps: int, refinement: str | None = None) -> "Upscaling":
        """These settings with what another way of refining usually has above a stage of `steps` steps."""
        chosen = replace(self, refinement=refinement or self.refinement)
        usual = dict(chosen.way.usual(steps, self.strength))
        if not self.guidance_scale:  # the model takes none
            usual.pop("guidance_scale", None)
        return replace(chosen, **usual)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One size of the cascade, which starts from a picture or from noise. Raises ValueError for no ranks."""

    height: int
    width: int
    sampling: Sampling = field(default_factory=Sampling)
    ranks: int | None = None
    """Most ranks that draw it, the others being idle; None: all."""
    resting: tuple[str, ...] = ()
    """Adapters of the transformer, such as LoRA, that do not work in it."""

    def __post_init__(self) -> None:
        if self.ranks is not None and self.ranks < 1:
            raise ValueError(f"a stage needs at least one rank, got {self.ranks}; nearest: 1")

    @property
    def size(self) -> Size:
        return self.height, self.width

    @property
    def starts_from_picture(self) -> bool:
        return isinstance(self.sampling, FromPicture)

    def is_at(self, where: AtStages) -> bool:
        """Whether it is one of these stages."""
        return max(self.size) >= where if isinstance(where, int) else isinstance(self.sampling, Upscaling)

    def ranks_among(self, most: int, units: int) -> int:
        """Ranks that draw it of `most`, where `units` of rows can be shared out."""
        return min(most, self.ranks or most, units)


def on_ranks(stages: tuple[Stage, ...], ranks: Mapping[Size, int]) -> tuple[Stage, ...]:
    """Stages with the ranks chosen for their sizes; all ranks where there is none."""
    return tuple(replace(stage, ranks=ranks.get(stage.size)) for stage in stages)


def with_adapters(stages: tuple[Stage, ...], where: Mapping[str, AtStages]) -> tuple[Stage, ...]:
    """Stages in which those adapters rest that are for others."""
    return tuple(
        replace(stage, resting=tuple(name for name, at in where.items() if not stage.is_at(at))) for stage in stages
    )


def check_adapter(stages: Sequence[Stage], where: AtStages) -> None:
    """Raises ValueError where an adapter is for none of these stages, the largest of which is the nearest."""
    if where != "upper" and (not isinstance(where, int) or where < 1):
        raise ValueError(f"stages of a LoRA must be upper or a number of pixels, got {where!r}; nearest: upper")
    largest = max((max(stage.size) for stage in stages), default=None)
    if largest is None or any(stage.is_at(where) for stage in stages):
        return
    rule = "no stage refines a picture" if where == "upper" else f"no stage has {where} px along its longer side"
    raise ValueError(f"{rule}, the largest has {largest}; nearest: {largest}")


def check_refining(stages: tuple[Stage, ...], asked: str | None = None) -> None:
    """Raises ValueError where no stage is refined in the way `asked` for, or one has nothing to be refined by."""
    upper = [stage.sampling for stage in stages if isinstance(stage.sampling, Upscaling)]
    if asked is not None and stages and not upper:
        height, width = stages[-1].size
        raise ValueError(
            f"refinement is for sizes above the native one, got {asked} for {width} x {height} px in one "
            "stage; nearest: none"
        )
    keeping = next((sampling.refinement for sampling in upper if sampling.way.keeps), None)
    if keeping is None:
        return
    if isinstance(stages[0].sampling, Upscaling):
        raise ValueError(f"refinement {keeping} goes by the steps of a stage below, got a picture; nearest: sdedit")
    for below, above in pairwise(stages):
        most, steps = below.sampling.steps, above.sampling.steps
        if steps > most:
            rule = f"refinement {keeping} takes no more steps than the stage below, which has {most}"
            raise ValueError(f"{rule}, got {steps}; nearest: {most}")


def plan_cascade(
    size: Size, *, native: int, token: int, sampling: Sampling, upscaling: Upscaling, cascade: bool = True
) -> tuple[Stage, ...]:
    """Stages to `size`, the first by `sampling` up to the native size; `native`, `token`: squares' sides in pixels."""
    base = base_size(size, native=native, token=token) if cascade else size
    first = Stage(height=base[0], width=base[1], sampling=sampling)
    return (first, *_refining(sizes_up_to(size, start=base, token=token), upscaling))


def plan_upscaling(picture: Size, size: Size, *, native: int, token: int, upscaling: Upscaling) -> tuple[Stage, ...]:
    """Stages from a picture to `size`, at least one; a picture below the native size is refined there first."""
    base = base_size(size, native=native, token=token)
    if picture[0] * picture[1] < base[0] * base[1]:
        sizes: tuple[Size, ...] = (base, *sizes_up_to(size, start=base, token=token))
    else:
        sizes = sizes_up_to(size, start=picture, token=token) or (size,)
    return _refining(sizes, upscaling)


def base_size(size: Size, *, native: int, token: int) -> Size:
    """Native number of pixels in the shape of `size`; `size` itself where that is smaller."""
    shrink = max(native / sqrt(size[0] * size[1]), LEAST_SHARE_OF_NATIVE * native / min(size))
    if shrink >= 1:
        return size
    return _whole_tokens(size[0] * shrink, token), _whole_tokens(size[1] * shrink, token)


def size_like(picture: Size, height: int | None, width: int | None, *, native: int | None, unit: int) -> Size:
    """A size of which the picture's shape decides what is None; the native number of pixels, or less, where both are.

    Sides that it decides are multiples of `unit`. Raises ValueError where the native size is asked for, and not known.
    """
    if height is None and width is None:
        if native is None:
            raise ValueError("a size is needed where the native one is not known")
        shrink = native / sqrt(picture[0] * picture[1])
        height, width = (max(1, int(side * shrink / unit + ROUNDING)) * unit for side in picture)
    if height is None:
        assert width is not None
        return _whole_tokens(picture[0] * width / picture[1], unit), width
    return height, width or _whole_tokens(picture[1] * height / picture[0], unit)


def sizes_up_to(size: Size, *, start: Size, token: int) -> tuple[Size, ...]:
    """Sizes after `start` (which need not be whole tokens) up to `size`, each at most about twice the one before."""
    if start == size:
        return ()
    growth = max(1.0, *(new / old for new, old in zip(size, start, strict=True)))
    count = max(1, ceil(log2(growth) - SPARE_DOUBLINGS))
    between = [
        tuple(_whole_tokens(old * (new / old) ** (index / count), token) for old, new in zip(start, size, strict=True))
        for index in range(1, count)
    ]
    return (*((height, width) for height, width in between), size)


def _refining(sizes: tuple[Size, ...], upscaling: Upscaling) -> tuple[Stage, ...]:
    later = replace(upscaling, steps=upscaling.later_steps or upscaling.steps)
    samplings = (later if index else upscaling for index in range(len(sizes)))
    return tuple(
        Stage(height=height, width=width, sampling=sampling)
        for (height, width), sampling in zip(sizes, samplings, strict=True)
    )


def _whole_tokens(side: float, token: int) -> int:
    return max(1, round(side / token)) * token
