"""Pictures that control a drawing through ControlNets: read on rank 0, resized to each stage, encoded over stripes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import Tensor

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.rows import move_rows
from clear_dist.drawing.encoding import encode_rows, in_vae_range, join_rows
from clear_dist.engine.family import Condition, ControlledAdapter, PipelineAdapter
from clear_dist.engine.striped import StripedModel, striped_of
from clear_dist.geometry import Rows
from clear_dist.stages import Size, Stage


@dataclass(frozen=True, kw_only=True)
class Control:
    """One picture for a pipeline's ControlNets; a pipeline may take several."""

    image: Image | None
    """On rank 0, in RGB; the others need none."""
    scale: float = 1.0
    """Factor of the ControlNet's outputs."""
    mode: int | None = None
    """Kind of picture, for a union, which was trained for several; else None."""


def conditions_of(
    controls: Sequence[Control],
    adapter: ControlledAdapter,
    vae: Any,
    stage: Stage,
    group: Group,
    stripes: tuple[Rows, ...],
    counters: Counters,
) -> tuple[Condition, ...]:
    """What ControlNets read in a stage, equal on all ranks of `group`, whose rows of tokens `stripes` are."""
    return tuple(
        Condition(picture=_read(control, adapter, vae, stage, group, stripes, counters), scale=control.scale,
                  mode=control.mode)
        for control in controls
    )  # fmt: skip


def _read(
    control: Control,
    adapter: ControlledAdapter,
    vae: Any,
    stage: Stage,
    group: Group,
    stripes: tuple[Rows, ...],
    counters: Counters,
) -> Tensor:
    if adapter.reads_pixels:
        every = (Rows(0, stage.height),) * group.size
        return in_vae_range(_rows(control.image, stage.size, group, every, counters)).to(vae.dtype)
    token = adapter.token_size
    in_pixels = tuple(Rows(token * rows.start, token * rows.stop) for rows in stripes)
    mine = _rows(control.image, stage.size, group, in_pixels, counters)
    return join_rows(encode_rows(vae, mine, group, stripes, counters), group, stripes, counters)


def _rows(image: Image | None, size: Size, group: Group, want: tuple[Rows, ...], counters: Counters) -> Tensor:
    """Bytes [1, 3, R, W] of the rows that this rank wants, of rank 0's picture resized as diffusers resizes it."""
    height, width = size
    pixels = None
    if group.rank == 0:
        assert image is not None, "rank 0 was asked for it"
        resized = image.resize((width, height), Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].to(group.device)
    have = (Rows(0, height), *(Rows(0, 0),) * (group.size - 1))
    shape = (1, 3, width)
    return move_rows(pixels, group, have, want, shape=shape, dtype=torch.uint8, counters=counters)


def controlled(adapter: PipelineAdapter) -> ControlledAdapter:
    """The adapter of a pipeline with ControlNets."""
    assert isinstance(adapter, ControlledAdapter), f"{type(adapter).__name__} knows no ControlNets"
    return adapter


def striped_nets(pipe: Any) -> list[StripedModel]:
    """The pipeline's ControlNets on stripes, each once; raises ValueError where one is whole."""
    controlnet = getattr(pipe, "controlnet", None)
    nets = [] if controlnet is None else getattr(controlnet, "nets", [controlnet])
    found = [striped_of(net) for net in dict.fromkeys(nets)]
    if None in found:
        raise ValueError("the ControlNet must be on stripes: give it to the pipeline, then call clear_dist.parallelize")
    return [striped for striped in found if striped is not None]
