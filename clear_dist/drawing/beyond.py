"""How a transformer runs in a stage: on which ranks, and what is changed above its native size."""

from clear_dist.engine.extrapolation import Extrapolation
from clear_dist.engine.family import PipelineAdapter
from clear_dist.engine.half_token import may_shift
from clear_dist.engine.striped import StripedModel
from clear_dist.engine.text_copies import may_copy
from clear_dist.geometry import most_stripes
from clear_dist.stages import Stage, Upscaling


def ranks_of(stage: Stage, striped: StripedModel, token: int) -> int:
    """Ranks that draw a stage; raises ValueError where all are needed."""
    group, settings = striped.group, striped.settings
    size = stage.height // token, stage.width // token
    ranks = stage.ranks_among(group.size, most_stripes(size, cut=settings.options.cut, unit=settings.unit))
    if striped.shards and ranks < group.size:  # idle ones would not give others their share
        raise ValueError(
            f"sharded weights need all ranks in every stage, and {stage.width} x {stage.height} pixels are "
            f"for {ranks} at most, by their tokens and Stage.ranks, got {group.size} ranks; nearest: {ranks}"
        )
    return ranks


def extrapolation_of(
    stage: Stage, striped: StripedModel, adapter: PipelineAdapter, *, is_alone: bool
) -> Extrapolation | None:
    """Changes of Sec. 4.3, and of the stage's way of refining; None at the native size and below.

    A model with YaRN has positions of any size, which sharpen attention by themselves: it has a way's own changes only.
    `is_alone`: the model sees the picture's own tokens and text, not those of ControlNets or references.
    """
    native, upper = (adapter.native_size // adapter.token_size) ** 2, stage.sampling
    tokens = stage.height * stage.width // adapter.token_size**2
    if not isinstance(upper, Upscaling) or tokens <= native:
        return None
    shifts = upper.way.shifts and is_alone and may_shift(striped.family, striped.settings)
    copies = upper.way.copies and is_alone and may_copy(striped.family, striped.settings)
    block = adapter.native_size // adapter.token_size if copies else None
    if adapter.has_yarn:
        steps = Extrapolation(native_tokens=native, sharpens=False, shifts=shifts, text_block=block)
        return steps if shifts or copies else None
    return Extrapolation(
        native_tokens=native,
        ntk_factor=upper.ntk_factor,
        least_frequency=(native / tokens) ** 0.5 if upper.ntk == "clipped" else 0.0,
        position_scale=(native / tokens) ** 0.5 if upper.interpolate_positions else 1.0,
        shifts=shifts,
        text_block=block,
    )
